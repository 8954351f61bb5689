"""The cuda runner: decode steps as CUDA graphs over Triton kernels."""
