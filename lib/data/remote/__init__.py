"""Files that are not on this machine: addresses, retries, the local cache."""
