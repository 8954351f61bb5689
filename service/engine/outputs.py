"""Outputs: the outputs of all sequences in an engine, and their events until they are delivered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from service.engine.adapters import Adapters
from service.engine.guide import Guides
from service.engine.inbox import Work
from service.engine.output import OutputBuilder
from service.errors import BadRequest
from service.messages import End, Event, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from model.grammar import Grammars


class Outputs:
    """One `OutputBuilder` per sequence, by request id. Used from the engine's thread."""

    def __init__(
        self,
        *,
        token_bytes: Sequence[bytes],
        visible_bytes: Sequence[bytes],
        eos_ids: frozenset[int],
        vocab_size: int,
        grammars: Grammars | None,
        adapters: Adapters,
        may_be_open: bool = False,
    ) -> None:
        """`visible_bytes`: the same with names for special tokens. `may_be_open`: see `Guides`."""
        self.builders: dict[str, OutputBuilder] = {}
        self.guides = Guides(
            grammars,
            token_bytes=token_bytes,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            may_be_open=may_be_open,
        )
        self.undelivered: list[Event] = []
        self._token_bytes = token_bytes
        self._visible_bytes = visible_bytes
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._adapters = adapters

    def begin(self, work: Work) -> OutputBuilder | None:
        """A builder for a request that is to be scheduled. None if its output is complete already:
        then its end is an event. Raises BadRequest.
        """
        request = work.request
        self._check(work)
        guide = self.guides.make(request, tokens=work.tokens)
        skip = request.skip_special_tokens
        builder = OutputBuilder(
            request,
            token_bytes=self._token_bytes if skip else self._visible_bytes,
            eos_ids=self._eos_ids,
            tokens=work.tokens,
            guide=guide,
            numeric_class=self._adapters.class_of(request),
        )
        # An engine died between the last token and the end. If the token limit is reached, the
        # guide has yet to find out whether the grammar ends there, too.
        if builder.reason is not None and not (guide and builder.reason is FinishReason.LENGTH):
            self.undelivered.append(Event(request.id, builder.end(builder.reason)))
            return None
        return builder

    def reject(self, work: Work, error: BadRequest) -> None:
        end = End(count=len(work.tokens), reason=FinishReason.ERROR, error=error.code)
        self.undelivered.append(Event(work.request.id, end))

    def score_prompt(self, request_id: str, scores: Iterable[tuple[int, TokenLogprob]]) -> None:
        """Keeps log probabilities of prompt tokens, by position, for the first record."""
        prompt_logprobs = self.builders[request_id].prompt_logprobs
        for position, score in scores:
            prompt_logprobs[position] = score

    def extend(
        self, request_id: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
    ) -> tuple[int, ...]:
        """Appends sampled tokens; returns those up to the end of the output."""
        record = self.builders[request_id].take(tokens, logprobs)
        self.undelivered.append(Event(request_id, record))
        return record.ids

    def end(self, request_id: str, reason: FinishReason, *, cached_tokens: int) -> None:
        end = self.builders.pop(request_id).end(reason, cached_tokens=cached_tokens)
        self.undelivered.append(Event(request_id, end))

    def drop(self, request_id: str) -> None:
        """Removes an output and its events that are not delivered yet."""
        self.builders.pop(request_id, None)
        self.undelivered = [each for each in self.undelivered if each.request_id != request_id]

    def without_mask(self) -> dict[str, OutputBuilder]:
        """Outputs whose next token has no mask yet."""
        return {
            request_id: builder
            for request_id, builder in self.builders.items()
            if builder.lacks_mask
        }

    def _check(self, work: Work) -> None:
        """Rejects what would break the runner; the API lets none of it through."""
        request, vocab_size = work.request, self._vocab_size
        sampling = request.sampling
        biased = [token for token, _ in sampling.logit_bias]
        banned = [token for sequence in sampling.banned for token in sequence]
        given = (request.prompt_ids, work.tokens, request.stop_token_ids, request.prediction)
        for ids in (*given, biased, banned, sampling.allowed):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                raise BadRequest(
                    f"token ids must be between 0 and {vocab_size - 1}", code="invalid_token_id"
                )
        if not 0 <= request.sampling.seed < 2**64 or "" in request.stop:
            raise BadRequest("seed must be between 0 and 2**64 - 1, stop not empty")
