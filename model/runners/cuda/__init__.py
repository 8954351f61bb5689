"""The cuda runner: steps on an NVIDIA GPU by the Triton kernels, decode steps as CUDA graphs.

build          makes a runner: loads, measures memory, verifies exactness
runner         launches and collects steps
network        weights, and a step's path through them
graphs         CUDA graphs of decode steps: buckets, capture, replay, padding
padding        steps of padding rows: to compile, warm up and measure
logits         masks, biases, penalties, log probabilities
slots          the host's mirror of the batch slots
workspace      device tensors of all steps
buffers        pinned buffers between host and device
cublas         vendor BLAS, for products of which it has our bits
chip           which GPUs are supported
device_memory  how many KV blocks fit
compile_ahead  kernels compiled in parallel, before they are launched
accelerator    what is needed of CUDA, and a stand-in for tests on a CPU
"""
