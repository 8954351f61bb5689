"""OutputBuilder: the output of one sequence. Tokens -> text, digest and finish reason.

It is a function of the request and of the output tokens alone, so after a failover it is rebuilt
from the journalled tokens. Independent of blocks, budgets and queues.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from service.engine.detokenize import Detokenizer
from service.engine.guide import Guide
from service.messages import (
    End,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    Tokens,
    rolling_digest,
)


def stop_ids(request: GenerationRequest, eos_ids: frozenset[int]) -> frozenset[int]:
    """Tokens that end an output. With `ignore_eos` the model's own are ordinary text."""
    return frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_ids)


class OutputBuilder:
    """Builds the output of one request as its tokens come.

    `reason` is set with the token that ends the output. A stop token counts and has no text unless
    the request includes it; a stop string cuts the text and keeps the tokens in which it began.
    An output that has completed its grammar, so that only a stop token could follow, ends without
    one. The caller passes the earlier `tokens` to `guide`; `verdict` is the reason that follows
    from them.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        token_bytes: Sequence[bytes],
        eos_ids: frozenset[int],
        tokens: tuple[int, ...] = (),
        guide: Guide | None = None,
        numeric_class: str = "",
    ) -> None:
        self.count = 0
        self.reason: FinishReason | None = None
        self.stopped_by: str | int | None = None
        # By position; the first token of a prompt has none. Part of the first record only.
        self.prompt_logprobs: list[TokenLogprob | None] = []
        if request.prompt_logprobs is not None and not tokens:
            self.prompt_logprobs = [None] * len(request.prompt_ids)
        self._numeric_class = numeric_class
        self._max_tokens = request.max_tokens
        self._stop_ids = stop_ids(request, eos_ids)
        self._include_stop = request.include_stop
        self._detokenizer = Detokenizer(
            token_bytes, request.stop, include_stop=request.include_stop
        )
        self.guide: Guide | None = None
        self._digest = 0
        for token in tokens:  # their text is in the journal already
            self._read(token)
        self.guide = guide

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Tokens:
        """Reads the next tokens up to one that ends the output; returns the record of those read.

        Needs at least one token. Not called after the end.
        """
        start = self.count
        text = self._read(tokens[0])
        for token in tokens[1:]:
            if self.reason is not None:
                break
            text += self._read(token)
        num = self.count - start
        prompt_logprobs = tuple(self.prompt_logprobs)
        self.prompt_logprobs = []
        return Tokens(
            start=start,
            ids=tuple(tokens[:num]),
            text=text,
            digest=self._digest,
            logprobs=tuple(logprobs[:num]),
            prompt_logprobs=prompt_logprobs,
            numeric_class="" if start else self._numeric_class,
        )

    @property
    def lacks_mask(self) -> bool:
        """Whether the grammar's mask for the next token is not computed yet."""
        return self.guide is not None and not self.guide.ready

    @property
    def verdict(self) -> FinishReason | None:
        """Why the output ends here, by its tokens and its grammar; None if it continues."""
        guide = self.guide
        if guide is None:
            return self.reason
        if guide.ended:
            return FinishReason.STOP
        if guide.failed and self.reason is None:
            return FinishReason.ERROR
        return None if guide.is_behind else self.reason

    def end(self, reason: FinishReason, *, cached_tokens: int = 0) -> End:
        """The terminal record."""
        return End(
            count=self.count,
            reason=reason,
            cached_tokens=cached_tokens,
            stopped_by=self.stopped_by,
            error="grammar_failed" if reason is FinishReason.ERROR else None,
            ended_at=int(time.time()),
        )

    def _read(self, token: int) -> str:
        self.count += 1
        self._digest = rolling_digest((token,), previous=self._digest)
        if token in self._stop_ids:
            self.stopped_by = token
            self.reason = FinishReason.STOP
            text = self._detokenizer.push(token) if self._include_stop else ""
            return text + self._detokenizer.finish()
        text = self._detokenizer.push(token)
        reason = self._reason_after(token)
        if reason is None:
            return text
        text += self._detokenizer.finish()
        # Checked after `finish`: the last bytes may complete a stop string that ends in U+FFFD.
        self.stopped_by = self._detokenizer.stopped_by
        self.reason = reason if self.stopped_by is None else FinishReason.STOP
        return text

    def _reason_after(self, token: int) -> FinishReason | None:
        """Why the output ends with a token that has text; None if it continues."""
        if self._detokenizer.stopped_by is not None:
            return FinishReason.STOP
        if self.guide is not None:
            self.guide.read(token)
            if self.guide.ended:
                return FinishReason.STOP
        return FinishReason.LENGTH if self.count >= self._max_tokens else None
