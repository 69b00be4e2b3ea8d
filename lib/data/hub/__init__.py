"""Data sets that the `datasets` library reads: the Hugging Face Hub, parquet files, folders of `save_to_disk`."""
