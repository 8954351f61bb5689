"""SegmentPacker: packs the batches of an engine whose cache is compressed to anchors."""

from __future__ import annotations

from dataclasses import replace

from model.batch import Batch
from model.segments import segments_batch
from service.engine.pack import Packer
from service.engine.plan import Plan


class SegmentPacker:
    """Adds to each batch the segments of its tokens, all of which must have been read."""

    def __init__(self, packer: Packer, anchor_ids: frozenset[int]) -> None:
        self._packer = packer
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
        return replace(self._packer.pack(plan), segments=segments_batch(texts))
