"""A run on disk and as a process: its folder, checkpoints, metrics, stop signals, and its heartbeat."""
