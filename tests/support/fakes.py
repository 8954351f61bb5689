"""OracleRunner: a second real implementation of the Runner Protocol, without a network.

Its KV pool holds token ids: what a step computes is written to the slot that the batch names, and
the next token is a hash of the ids read back through the block table. A wrong table, slot, position
or parameter, a lost or a doubled token changes the answer. `oracle_answer` says what the answer of
a request must be, from the request alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from model.batch import Batch, Bools, SamplingBatch, StepOutput, unpack_masks
from model.config import ModelConfig
from model.runners import StepHandle
from service.api.http.context import Probes
from service.messages import GenerationRequest, TokenLogprob

VOCAB_SIZE = 97
EOS_ID = 96
EOS_IDS = frozenset({EOS_ID})
TOKEN_BYTES: tuple[bytes, ...] = tuple(
    [bytes([97 + token % 26]) * (1 + token // 26 % 2) for token in range(60)]
    + ["é€😀ab "[index % 6].encode() for index in range(20)]
    + [bytes([byte]) for byte in "€😀é".encode()]
    + [b"the", b" end", b"", b"\xff", b"\n", b"\xf0\x9f", b"\x98\x80"]
    + [b"<eos>"]
)
assert len(TOKEN_BYTES) == VOCAB_SIZE
VISIBLE_BYTES: tuple[bytes, ...] = tuple(text or b"<none>" for text in TOKEN_BYTES)

ALL_WELL = Probes(
    started=lambda: True,
    live=lambda: True,
    draining=lambda: False,
)
"""What a process that is well says of itself."""


def _draw(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _next_token(
    context: tuple[int, ...],
    *,
    settings: tuple[float, ...],
    penalties: Iterable[tuple[int, float]],
    biases: Iterable[tuple[int, float]],
    allowed: Iterable[int],
) -> int:
    """The token after `context`: any change of an argument changes it, -inf and masks forbid it."""
    biases = sorted(biases)
    forbidden = {token for token, value in biases if value == -np.inf}
    if allowed := set(allowed):
        forbidden |= set(range(VOCAB_SIZE)) - allowed
    drawn = _draw(context, settings, sorted(penalties), biases)
    # Ends of an answer are drawn more often than one time in 97.
    token = EOS_ID if drawn % 23 == 0 else drawn // 23 % VOCAB_SIZE
    while token in forbidden:
        token = (token + 1) % VOCAB_SIZE
    return token


def _score(context: tuple[int, ...], token: int) -> float:
    return -float(np.float32(_draw("score", context, token) % 10_000 / 1000))


def _top(context: tuple[int, ...], num: int) -> list[tuple[int, float]]:
    scored = [(token, _score(context, token)) for token in range(VOCAB_SIZE)]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:num]


class OracleRunner:
    """`on_run` is called with each batch before it is computed; it may raise."""

    exact = True

    def __init__(
        self,
        *,
        block_size: int = 4,
        num_blocks: int = 64,
        max_model_len: int = 64,
        on_run: Callable[[Batch], None] | None = None,
    ) -> None:
        self.config = ModelConfig(
            family="oracle",
            vocab_size=VOCAB_SIZE,
            hidden_size=2,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            intermediate_size=2,
            max_model_len=max_model_len,
        )
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.numeric_class = "oracle"
        self._pool = np.full((num_blocks, block_size), -1, np.int64)
        self._on_run = on_run

    def run(self, batch: Batch) -> StepOutput:
        """Stores the step's ids, reads every context back and draws from it."""
        if self._on_run is not None:
            self._on_run(batch)
        batch.check(block_size=self.block_size, num_blocks=self.num_blocks, vocab_size=VOCAB_SIZE)
        owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts_S1))
        blocks, offsets = np.divmod(batch.positions_T, self.block_size)
        self._pool[batch.block_table_SB[owner, blocks], offsets] = batch.tokens_T

        def context(row: int) -> tuple[int, ...]:
            length = int(batch.positions_T[row]) + 1
            table = batch.block_table_SB[owner[row], : -(-length // self.block_size)]
            return tuple(self._pool[table].ravel()[:length].tolist())

        sampled = [context(row) for row in batch.sample_rows_R]
        tokens = [
            _next_token(
                ids,
                settings=_settings(batch.sampling, row),
                penalties=_entries(
                    batch.sampling.penalty_rows_P,
                    batch.sampling.penalty_ids_P,
                    batch.sampling.penalty_counts_P,
                    row=row,
                ),
                biases=_entries(
                    batch.sampling.bias_rows_E,
                    batch.sampling.bias_ids_E,
                    batch.sampling.bias_values_E,
                    row=row,
                ),
                allowed=_allowed(batch.sampling, row),
            )
            for row, ids in enumerate(sampled)
        ]
        scored = [context(row) for row in batch.score_rows_Q]
        score_ids = batch.score_ids_Q.tolist()
        return StepOutput(
            tokens_R=np.array(tokens, np.int32),
            logprobs_R=np.array(
                [_score(ids, token) for ids, token in zip(sampled, tokens, strict=True)], np.float32
            ),
            **_tops(sampled, batch.sampling.num_top, ids="top_ids_RN", values="top_logprobs_RN"),
            score_logprobs_Q=np.array(
                [_score(ids, token) for ids, token in zip(scored, score_ids, strict=True)],
                np.float32,
            ),
            **_tops(
                scored,
                batch.score_num_top,
                ids="score_top_ids_QN",
                values="score_top_logprobs_QN",
            ),
        )

    def warm_up(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to give back."""


class Overlapping:
    """Before a runner that blocks: its steps overlap, with the unread tokens read by seat.

    It insists on the rules. `most_ahead` is how many steps were ever under way at once.
    """

    most_sampled = 64
    beside_host = True

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.most_ahead = 0
        self._sampled: dict[int, int] = {}  # seat -> its newest token
        self._under_way: deque[tuple[StepHandle, StepOutput]] = deque()
        self._steps = 0

    def run(self, batch: Batch) -> StepOutput:
        """A step with no other beside it."""
        assert not self._under_way
        return self.collect(self.launch(batch))

    def launch(self, batch: Batch, *, unread_T: Bools | None = None) -> StepHandle:
        """Computes a step and keeps what came out."""
        assert len(self._under_way) < 2
        seats_T = _seats(batch)
        if unread_T is not None:
            sampling = batch.sampling
            told = {*sampling.penalty_rows_P.tolist(), *sampling.mask_rows_M.tolist()}
            told.update(sampling.open_rows_L.tolist())
            assert not unread_T[batch.sample_rows_R[sorted(told)]].any()
            assert not unread_T[batch.score_rows_Q].any()
        tokens_T = self._resolved(batch, unread_T)
        compute = super().run  # type: ignore[misc]  # of the runner that it stands before
        output: StepOutput = compute(replace(batch, tokens_T=tokens_T))
        sampled = zip(seats_T[batch.sample_rows_R].tolist(), output.tokens_R.tolist(), strict=True)
        self._sampled.update(sampled)
        handle = StepHandle(self._steps)
        self._steps += 1
        self._under_way.append((handle, output))
        self.most_ahead = max(self.most_ahead, len(self._under_way))
        return handle

    def _resolved(self, batch: Batch, unread_T: Bools | None) -> np.ndarray:
        tokens_T, seats_T = batch.tokens_T.copy(), _seats(batch)
        if unread_T is not None:
            assert self._under_way, "somebody has read every token"
            for row in np.flatnonzero(unread_T):
                tokens_T[row] = self._sampled[int(seats_T[row])]
        return tokens_T

    def collect(self, handle: StepHandle) -> StepOutput:
        """Shows what came out."""
        oldest, output = self._under_way.popleft()
        assert oldest == handle, "in the order they were launched"
        return output


class OverlappedOracle(Overlapping, OracleRunner):
    """The oracle, one step ahead."""


class Deferring(Overlapping):
    """Before a runner that blocks: can sample later than it launches."""

    num_deferred = 0
    _deferred: Batch | None = None

    def launch(
        self, batch: Batch, *, unread_T: Bools | None = None, deferred: bool = False
    ) -> StepHandle:
        """Keeps a deferred step with the tokens that it reads now."""
        assert self._deferred is None
        if not deferred:
            return super().launch(batch, unread_T=unread_T)
        assert len(self._under_way) < 2
        self.num_deferred += 1
        self._deferred = replace(batch, tokens_T=self._resolved(batch, unread_T))
        self.most_ahead = max(self.most_ahead, 1 + len(self._under_way))
        return StepHandle(self._steps)

    def sample(self, handle: StepHandle, sampling: SamplingBatch) -> None:
        """Computes what was deferred."""
        batch, self._deferred = self._deferred, None
        assert batch is not None
        assert super().launch(replace(batch, sampling=sampling)) == handle


class DeferringOracle(Deferring, OracleRunner):
    """The oracle, one step ahead, as the native runner is."""


def _seats(batch: Batch) -> np.ndarray:
    return np.repeat(batch.batch_slots_S, np.diff(batch.query_starts_S1))


def _settings(sampling: SamplingBatch, row: int) -> tuple[float, ...]:
    columns = (
        sampling.seeds_R,
        sampling.choices_R,
        sampling.indices_R,
        sampling.temperatures_R,
        sampling.top_ks_R,
        sampling.top_ps_R,
        sampling.min_ps_R,
        sampling.presence_R,
        sampling.frequency_R,
        sampling.repetition_R,
    )
    return tuple(column[row].item() for column in columns)


def _allowed(sampling: SamplingBatch, row: int) -> list[int]:
    """Of a row's mask; none if it has no mask."""
    masks = unpack_masks(sampling.masks_MW[sampling.mask_rows_M == row], VOCAB_SIZE)
    return [int(token) for mask in masks for token in np.flatnonzero(mask)]


def _entries(
    rows: np.ndarray, ids: np.ndarray, values: np.ndarray, *, row: int
) -> list[tuple[int, float]]:
    mine = rows == row
    return list(zip(ids[mine].tolist(), values[mine].astype(float).tolist(), strict=True))


def _tops(contexts: list[tuple[int, ...]], num: int, *, ids: str, values: str) -> dict[str, Any]:
    tops = [_top(context, num) for context in contexts] if num else []
    shape = (len(contexts), num)
    return {
        ids: np.array([[token for token, _ in top] for top in tops], np.int32).reshape(shape),
        values: np.array([[value for _, value in top] for top in tops], np.float32).reshape(shape),
    }


def oracle_answer(request: GenerationRequest, *, num: int | None = None) -> list[int]:
    """The ids of the answer, stop strings left aside: up to an ending token or `num` of them."""
    params = request.sampling
    ending = set(request.stop_token_ids) | (set() if request.ignore_eos else EOS_IDS)
    floats = np.array(
        [
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ],
        np.float32,
    ).tolist()
    answer: list[int] = []
    while len(answer) < (request.max_tokens if num is None else num):
        counted = set(answer) if params.presence_penalty or params.frequency_penalty else set()
        if params.repetition_penalty != 1.0:
            counted = {*answer, *request.prompt_ids}
        bias = {token: float(np.float32(value)) for token, value in params.logit_bias}
        if len(answer) < request.min_tokens:
            bias |= dict.fromkeys(ending, -np.inf)
        for *before, last in params.banned:
            if answer[len(answer) - len(before) :] == before:
                bias[last] = -np.inf
        token = _next_token(
            (*request.prompt_ids, *answer),
            settings=(
                params.seed,
                params.choice,
                len(answer),
                floats[0],
                params.top_k or VOCAB_SIZE,
                *floats[1:],
            ),
            penalties=[(token, float(answer.count(token))) for token in counted],
            biases=bias.items(),
            allowed=params.allowed,
        )
        answer.append(token)
        if token in ending:
            break
    return answer


def oracle_logprob(context: Sequence[int], token: int, *, num_top: int) -> TokenLogprob:
    """What the oracle says of a token after a context."""
    ids = tuple(context)
    top = tuple((t, float(np.float32(v))) for t, v in _top(ids, num_top))
    return TokenLogprob(float(np.float32(_score(ids, token))), top)
