"""The GPU benchmark: `python -m loadtest.bench.gpu`; one module per stage, and what stages share.

bench          context of a stage: models, timing, tables, remaining time
models         shapes and random weights     offline, http    two ways to run a workload
first, ceilings, kernels, products, exactness, steps, w1, transformers      the stages
"""
