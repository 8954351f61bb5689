"""The native step: a C++ library that computes a whole step of a decoder on a CPU, in 8 or 4 bits.

    build.py      sources -> a shared library, compiled if a compiler is found
    library.py    the library's C interface, typed
    quantize.py   canonical weights -> packed weights of the library, in 8 or in 4 bits
    src/          the step itself; kernels.h is where to begin

`model.runners.native` makes a Runner of it.
"""

from __future__ import annotations


class NativeUnavailable(RuntimeError):
    """The native step cannot be used on this machine; the message is a reason in one line."""
