"""Triton kernels of the cuda runner.

Every module holds kernels and the functions that launch them. The tests compare these with twins in
plain torch (tests/model/kernel_twins.py). Importing a module here imports
Triton; nothing else in the project does. With `TRITON_INTERPRET=1` in the environment of the first
import the kernels run on a CPU.

Exactness. A row's result must not depend on what else is in the step. Each row is computed on its
own; a sum over many terms is split at fixed places only, and the parts are added in order: `matmul`
splits K by the shape of the weight, `attention` splits the context at absolute positions. How many
programs share the work, and whether parts meet in registers or in memory, changes no bit. Kernels
are compiled without fusing products and sums, so that the same expression rounds alike in two
kernels, whatever stands around it.
"""
