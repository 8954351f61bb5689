"""Quire's service half: requests, queues, scheduling, HTTP. `model` knows tensors; this does not."""
