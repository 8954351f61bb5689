"""fan_out: several observers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

Observer = TypeVar("Observer")


def fan_out(*observers: Observer) -> Observer:
    """An observer that passes each call on to all `observers`, in order.

    A call returns the first result that is not None.
    """
    return observers[0] if len(observers) == 1 else cast("Observer", _FanOut(observers))


class _FanOut:
    def __init__(self, observers: Sequence[object]) -> None:
        self._observers = observers

    def __getattr__(self, name: str) -> Callable[..., object]:
        methods = [getattr(observer, name) for observer in self._observers]

        def call(*args: object, **kwargs: object) -> object:
            results = [method(*args, **kwargs) for method in methods]
            return next((result for result in results if result is not None), None)

        setattr(self, name, call)  # so that each name is looked up once
        return call
