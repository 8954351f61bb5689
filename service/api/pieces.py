"""Pieces: from journal records to what a client is shown of one choice, in any shape.

    Tokens, End  --ChoiceReader-->  Opening, Piece, End  --render-->  SSE events or one JSON body

The reader is a state machine over the records from the first one on: a resumed stream replays them,
so that the bytes after any event are the same as they were. It also guards the promise that a
client is shown one token sequence: a record that does not continue the last one raises
StreamDivergence.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from service.api.manifest import Endpoint, Manifest
from service.errors import StreamDivergence
from service.messages import End, Record, TokenLogprob, Tokens, rolling_digest


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its log probability (None: the first of a prompt has none) and text offset."""

    token: int
    logprob: TokenLogprob | None
    offset: int  # in characters from the start of the choice's text


@dataclass(frozen=True, slots=True)
class Opening:
    """Before a choice's first token: a chat's role, a response's item, an echoed prompt, ids."""

    text: str
    prompt_ids: tuple[int, ...]
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one record adds."""

    text: str
    ids: tuple[int, ...]
    scored: tuple[Scored, ...] = ()


Shown = Opening | Piece | End


class ChoiceReader:
    """One choice, up to the last record read. `count` and `digest` are of the tokens so far."""

    def __init__(self, manifest: Manifest, choice: int, tokenizer: Tokenizer) -> None:
        self._manifest = manifest
        self._prompt = manifest.prompt(choice)
        self._tokenizer = tokenizer
        self._offsets: _Offsets | None = None
        self._opened = False
        self.count = 0
        self.digest = 0
        self.num_chars = 0  # of the answer's text, what is echoed aside
        self.end: End | None = None

    @property
    def position(self) -> str:
        """The choice's part of an event id: tokens so far, and 24 bits of their digest."""
        return f"{self.count}.{self.digest & 0xFFFFFF:06x}"

    def read(self, record: Record) -> Iterator[Shown]:
        """What the record adds. Raises StreamDivergence where it does not continue the last."""
        if not self._opened:
            self._opened = True
            yield from self._open(record)
        if isinstance(record, End):
            if record.count != self.count:
                raise divergence()
            self.end = record
            yield record
            return
        digest = rolling_digest(record.ids, previous=self.digest)
        if record.start != self.count or digest != record.digest:
            raise divergence()
        self.count, self.digest = record.end, digest
        self.num_chars += len(record.text)
        yield Piece(record.text, record.ids, self._score(record.ids, record.logprobs))

    def _open(self, record: Record) -> Iterator[Opening]:
        manifest = self._manifest
        if manifest.logprobs is not None or manifest.width > manifest.keep:
            self._offsets = _Offsets(self._tokenizer)
        scored: tuple[Scored, ...] = ()
        if manifest.echo:
            if isinstance(record, Tokens):
                scored = self._score(self._prompt.ids, record.prompt_logprobs)
            if self._offsets is not None:
                self._offsets.restart(len(self._prompt.text or ""))
        opens = manifest.endpoint is not Endpoint.COMPLETIONS
        if opens or manifest.echo or manifest.return_token_ids:
            text = self._prompt.text if manifest.echo else None
            yield Opening(text or "", self._prompt.ids, scored)

    def _score(
        self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob | None, ...]
    ) -> tuple[Scored, ...]:
        if self._offsets is None:
            return ()
        return tuple(map(Scored, ids, logprobs, self._offsets.of(ids)))


class _Offsets:
    """Where in the text each token begins: the characters that the bytes before it complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.restart(0)

    def restart(self, offset: int) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = offset

    def of(self, ids: Iterable[int]) -> list[int]:
        offsets = []
        for token in ids:
            offsets.append(self._offset)
            if not self._tokenizer.is_special(token):
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes[token]))
        return offsets


def divergence() -> StreamDivergence:
    """The end of a stream whose journal was rewritten."""
    return StreamDivergence("the journal no longer continues what was sent", retryable=False)
