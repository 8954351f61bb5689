"""The queue in memory: embedded mode, one process."""
