"""The fixture `one_order`, also as a plugin of its own: the kernels' tests need no other one."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of the interpreter whose sums do not depend on where a row lies.

    A GPU's matrix instruction adds each element's terms in one order; NumPy's does not. In float64,
    rounded once, the difference is gone. Compiled kernels do not come here.
    """
    import numpy as np

    product = np.matmul

    def exact(a: Any, b: Any, dtype: Any = None) -> Any:
        wide = product(a.astype(np.float64), b.astype(np.float64))
        return wide.astype(dtype or a.dtype)

    monkeypatch.setattr(np, "matmul", exact)
