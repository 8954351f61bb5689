"""Adapters: which of the runner's adapters a request's model is, and the class of its answer.

A queue gives an engine only requests for models that it announces: its own and its adapters. The
KV and the journal of one never serve another: digests of blocks cover the class, and a request's
key the adapter's digest.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.messages import GenerationRequest, ModelCard, adapted_class


class Adapters:
    """The adapters of one runner, numbered from 1 in its order."""

    def __init__(self, numeric_class: str = "", cards: Sequence[ModelCard] = ()) -> None:
        """`numeric_class`: of answers without an adapter."""
        self._numbers = {card.key: number for number, card in enumerate(cards, start=1)}
        self._classes = [numeric_class]
        self._classes += [adapted_class(numeric_class, card.adapter) for card in cards]

    def number(self, request: GenerationRequest) -> int:
        """The number of a request's adapter; 0: none."""
        return self._numbers.get(request.model, 0)

    def class_of(self, request: GenerationRequest) -> str:
        """The numeric class of its answer."""
        return self._classes[self.number(request)]
