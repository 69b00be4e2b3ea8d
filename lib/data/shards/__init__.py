"""WebDataset tar shards: files, samples, annotations, the index, training and evaluation on them."""
