"""Load tests, the soak and benchmarks, run from the root of the repository."""
