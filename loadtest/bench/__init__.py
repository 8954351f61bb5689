"""Benchmarks: the comparison with other servers, the CPU engine, the GPU engine."""
