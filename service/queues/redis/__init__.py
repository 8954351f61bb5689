"""The queue in Redis: any number of API replicas and engines."""
