"""The packer: python -m lib.data.pack SOURCE --out DIR."""
