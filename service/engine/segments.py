"""SegmentPacker: the packer of an engine whose cache is compressed to anchors."""

from __future__ import annotations

from dataclasses import replace

from model.batch import Batch
from model.segments import segments_batch
from service.engine.pack import Packer
from service.engine.plan import EngineConfig, Plan


class SegmentPacker(Packer):
    """Adds to each batch the segments of its tokens. The tokens of a plan must have been read."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        block_size: int,
        max_model_len: int,
        vocab_size: int,
        eos_ids: frozenset[int],
        anchor_ids: frozenset[int],
    ) -> None:
        super().__init__(
            config,
            block_size=block_size,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
        )
        self._anchor_ids = anchor_ids

    def pack(self, plan: Plan) -> Batch:
        texts = [
            (
                sequence.scan(self._anchor_ids),
                range(sequence.num_computed, sequence.num_computed + num),
                sequence.anchor_blocks,
            )
            for sequence, num in plan.tokens.items()
        ]
        return replace(super().pack(plan), segments=segments_batch(texts))
