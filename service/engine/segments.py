"""SegmentPacker: packs the batches of an engine whose cache is compressed to anchors."""

from __future__ import annotations

from dataclasses import replace

from model.batch import Batch
from model.segments import segments_batch
from service.engine.pack import Packer
from service.engine.plan import Plan


class SegmentPacker(Packer):
    """Adds to each batch the segments of its tokens, all of which must have been read."""

    def pack(self, plan: Plan, *, deferred: bool = False) -> Batch:
        texts = [
            (
                sequence.scan(self.anchor_ids),
                range(sequence.num_computed, sequence.num_computed + num),
                sequence.anchor_blocks,
            )
            for sequence, num in plan.tokens.items()
        ]
        batch = super().pack(plan, deferred=deferred)
        return replace(batch, segments=segments_batch(texts))
