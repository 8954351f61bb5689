"""Quire's network half: weights, tensors, kernels. It knows nothing of requests, HTTP or queues."""
