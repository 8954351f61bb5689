"""Quire's service half: requests, queues, scheduling, HTTP. It knows no tensors; `model` does."""
