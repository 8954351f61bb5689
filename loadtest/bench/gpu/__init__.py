"""What `loadtest.bench.gpu_bench` measures: a module for each of its stages, and what they share.

bench          what a stage is given: models, timing, tables, the time it has left
stage          runs one stage in the process it is started in
models         shapes and random weights     offline, http    ways to put a workload through
ceilings, kernels, products, exactness, steps, w1, peer      the stages
"""
