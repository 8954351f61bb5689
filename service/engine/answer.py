"""Answer: what goes back of one sequence. Tokens -> text, digest and the reason to end.

It is a function of the request and of the answer's tokens alone, so a take-over rebuilds it by
reading the journalled tokens again. It knows no blocks, no budget and no queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """The tokens that end an answer. `ignore_eos` makes the model's own end ordinary text."""
    return frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else eos_ids)


class Answer:
    """The answer to one request, as its tokens come.

    `reason` is set with the token that ends it. A token that ends an answer counts and has no text;
    a stop string cuts the text and leaves the tokens that it began in. An answer that has fulfilled
    its grammar, so that only an end could follow, stops without one. `guide` is given `tokens` by
    the caller; `verdict` is the reason that follows from them.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        token_bytes: Sequence[bytes],
        eos_ids: frozenset[int],
        tokens: tuple[int, ...] = (),
        guide: Guide | None = None,
    ) -> None:
        self.count = 0
        self.reason: FinishReason | None = None
        self.stopped_by: str | int | None = None
        # By position; the first token of a prompt has none. Part of the first record alone.
        self.prompt_logprobs: list[TokenLogprob | None] = []
        if request.prompt_logprobs is not None and not tokens:
            self.prompt_logprobs = [None] * len(request.prompt_ids)
        self._max_tokens = request.max_tokens
        self._stop_ids = stop_ids(request, eos_ids)
        self._detokenizer = Detokenizer(token_bytes, request.stop)
        self.guide: Guide | None = None
        self._digest = 0
        for token in tokens:  # what became certain of their text is journalled with them
            self._read(token)
        self.guide = guide

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Tokens:
        """Reads the next tokens up to one that ends the answer; returns the record of those read.

        There is at least one. Not called after the end.
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
        )

    @property
    def verdict(self) -> FinishReason | None:
        """Why the answer ends here, by its tokens and its grammar; None: it may go on."""
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
        )

    def _read(self, token: int) -> str:
        self.count += 1
        self._digest = rolling_digest((token,), previous=self._digest)
        if token in self._stop_ids:
            self.stopped_by = token
            self.reason = FinishReason.STOP
            return self._detokenizer.finish()
        text = self._detokenizer.push(token)
        reason = self._reason_after(token)
        if reason is None:
            return text
        text += self._detokenizer.finish()
        # The last bytes may complete a stop string that ends in U+FFFD, so this is asked after.
        self.stopped_by = self._detokenizer.stopped_by
        self.reason = reason if self.stopped_by is None else FinishReason.STOP
        return text

    def _reason_after(self, token: int) -> FinishReason | None:
        """Why the answer ends with a token that has text; None: it goes on."""
        if self._detokenizer.stopped_by is not None:
            return FinishReason.STOP
        if self.guide is not None:
            self.guide.read(token)
            if self.guide.ended:
                return FinishReason.STOP
        return FinishReason.LENGTH if self.count >= self._max_tokens else None


def without_mask(answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Those whose next token has no mask yet."""
    return {
        request_id: answer
        for request_id, answer in answers.items()
        if answer.guide is not None and not answer.guide.ready
    }
