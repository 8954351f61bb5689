"""Laws of the torch runner, with a tiny random model: what else a step holds changes no answer."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import Norm, Position
from model.layers import PackedLinear
from model.runners import RUNNERS, RunnerOptions
from model.runners.logprobs import SCORED_AT_ONCE
from model.runners.torch import TorchRunner, choose_dtype
from model.transformer import Transformer
from tests.support.builders import Piece, make_batch, slowly, tiny_model_config, tiny_weights

Build = Callable[..., TorchRunner]


@dataclass(kw_only=True)
class Text:
    """A prompt on its way through a runner, and what came of it."""

    tokens: list[int]
    blocks: list[int]
    seat: int = 0
    computed: int = 0
    answer: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def piece(self, chunk: int) -> Piece:
        """Its next at most `chunk` tokens; the last one samples."""
        end = min(self.computed + chunk, len(self.tokens))
        count, self.computed = end - self.computed, end
        return Piece(
            tokens=self.tokens[:end],
            count=count,
            blocks=self.blocks,
            seat=self.seat,
            sample=end == len(self.tokens),
            sampling={"logprobs": True},
        )


def generate(runner: TorchRunner, texts: list[Text], *, count: int, chunk: int) -> None:
    """Runs all texts together until each has `count` tokens of answer."""
    while going := [text for text in texts if len(text.answer) < count]:
        pieces = [text.piece(chunk) for text in going]
        batch = make_batch(pieces, num_top=2)
        batch.check(block_size=runner.block_size, num_blocks=runner.num_blocks, vocab_size=97)
        output = runner.run(batch)
        sampled = [text for text, piece in zip(going, pieces, strict=True) if piece.sample]
        for row, text in enumerate(sampled):
            text.answer.append(int(output.tokens_R[row]))
            text.tokens.append(text.answer[-1])
            text.logprobs.append(float(output.logprobs_R[row]))
            assert output.top_ids_RN[row, 0] == text.answer[-1]
            assert output.top_logprobs_RN[row, 0] == output.logprobs_R[row]


def texts_of(lengths: list[int], *, seed: int = 0) -> list[Text]:
    """Random prompts, each on eight blocks and a seat of its own, drawn by the seed."""
    prompts, places = random.Random(1), random.Random(seed)
    blocks, seats = list(range(64)), list(range(8))
    places.shuffle(blocks)
    places.shuffle(seats)
    return [
        Text(
            tokens=[prompts.randrange(97) for _ in range(length)],
            blocks=blocks[8 * index : 8 * index + 8],
            seat=seats[index],
        )
        for index, length in enumerate(lengths)
    ]


LENGTHS = [1, 3, 17, 22, 8]


def singles(runner: TorchRunner) -> list[Text]:
    texts = texts_of(LENGTHS)
    for text in texts:
        generate(runner, [text], count=6, chunk=100)
    return texts


def assert_same(given: list[Text], expected: list[Text]) -> None:
    for one, other in zip(given, expected, strict=True):
        assert one.answer == other.answer
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("seed", [0, *slowly(1, 2)])
def test_a_batch_is_its_singles(tiny_runner: Build, chunk: int, seed: int) -> None:
    """However prompts are cut, whatever runs beside them, whichever blocks and seats they have."""
    expected = singles(tiny_runner())
    assert len({tuple(text.answer) for text in expected}) > 1
    texts = texts_of(LENGTHS, seed=seed)
    generate(tiny_runner(), texts, count=6, chunk=chunk)
    assert_same(texts, expected)


def test_blocks_left_by_others_do_not_matter(tiny_runner: Build) -> None:
    """A pool full of NaN gives what a fresh one gives."""
    expected = singles(tiny_runner())
    runner = tiny_runner()
    runner._cache.pool.fill_(torch.nan)
    texts = texts_of(LENGTHS, seed=5)
    generate(runner, texts, count=6, chunk=7)
    assert_same(texts, expected)


@pytest.mark.parametrize("length", [5, SCORED_AT_ONCE + 9])
def test_scores_are_log_probabilities_of_the_given_tokens(tiny_runner: Build, length: int) -> None:
    """Piece by piece the same as the whole text's log-softmax, with the likeliest beside it."""
    config = tiny_model_config()
    network = Transformer(config)
    network.load_state_dict(tiny_weights(config))
    tokens = random.Random(2).choices(range(97), k=length + 1)
    with torch.no_grad():
        expected = network(torch.tensor(tokens[:-1])).log_softmax(-1)
    scores = dict(enumerate(tokens[1:]))
    piece = Piece(tokens=tokens[:-1], count=length, blocks=range(32), sample=False, scores=scores)
    output = tiny_runner().run(make_batch([piece], score_num_top=3))
    at = expected[torch.arange(length), torch.tensor(tokens[1:])]
    np.testing.assert_allclose(output.score_logprobs_Q, at, atol=1e-4)
    np.testing.assert_allclose(output.score_top_logprobs_QN, expected.topk(3).values, atol=1e-4)
    assert np.array_equal(output.score_top_ids_QN, expected.topk(3).indices)
    assert output.tokens_R.shape == (0,)


def test_what_nobody_asked_for_is_empty(tiny_runner: Build) -> None:
    output = tiny_runner().run(make_batch([Piece(tokens=[1, 2], count=2, blocks=[0])]))
    assert output.tokens_R.shape == (1,)
    assert output.tokens_R.dtype == output.top_ids_RN.dtype == output.score_top_ids_QN.dtype
    assert output.tokens_R.dtype == np.int32
    for values in (output.logprobs_R, output.score_logprobs_Q):
        assert values.shape == (0,)
        assert values.dtype == np.float32
    assert not output.top_ids_RN.size
    assert not output.top_logprobs_RN.size
    assert not output.score_top_ids_QN.size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_stays_near_float32(tiny_runner: Build, kind: str, *, tied: bool) -> None:
    """Packed or not, log probabilities of a given text differ by rounding only."""
    biased: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    learned = {"norm": Norm.LAYER, "position": Position.LEARNED, "gated_mlp": False, **biased}
    config = tiny_model_config(tied_head=tied, **(learned if kind == "gpt2" else {}))
    tokens = random.Random(3).choices(range(97), k=31)
    scores = dict(enumerate(tokens[1:]))
    piece = Piece(tokens=tokens[:-1], count=30, blocks=range(8), scores=scores)
    outputs = [
        tiny_runner(config, dtype=dtype).run(make_batch([piece])).score_logprobs_Q
        for dtype in ("float32", "bfloat16")
    ]
    assert not np.array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[1]).mean() < 0.02 * np.abs(outputs[0]).mean()


@pytest.mark.skipif(not PackedLinear.available(), reason="oneDNN has no bfloat16 here")
def test_packed_linear_layers_are_linear_layers() -> None:
    torch.manual_seed(0)
    for bias in (None, torch.randn(24).bfloat16()):
        weight, x = torch.randn(24, 40).bfloat16(), torch.randn(5, 40).bfloat16()
        expected = torch.nn.functional.linear(x.double(), weight.double())
        expected = expected if bias is None else expected + bias
        given = PackedLinear(weight, bias)(x)
        torch.testing.assert_close(given.double(), expected, atol=0.1, rtol=0.01)


def test_weights_must_be_exactly_the_networks(tiny_runner: Build) -> None:
    weights = tiny_weights(tiny_model_config())
    without = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.weight"):
        tiny_runner(weights=without)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        tiny_runner(weights={**weights, "more.weight": weights["norm.weight"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny_runner(weights={**weights, "norm.weight": torch.ones(31)})


def test_the_pool_is_as_large_as_the_options_say(tiny_runner: Build) -> None:
    block = 2 * 2 * 4 * 2 * 8 * 4  # keys and values, layers, tokens, heads, width, bytes
    assert tiny_runner(num_blocks=None, kv_memory=10 * block + 3).num_blocks == 10
    assert tiny_runner(num_blocks=7).num_blocks == 7
    with pytest.raises(ValueError, match="kv_memory must be at least"):
        tiny_runner(num_blocks=None, kv_memory=block - 1)


def test_the_numeric_class_tells_what_numbers_depend_on(tiny_runner: Build) -> None:
    runner = tiny_runner()
    assert runner.numeric_class == f"torch-cpu-fp32-{torch.__version__}-000000000000"
    assert tiny_runner(dtype="bfloat16").numeric_class != runner.numeric_class
    assert not runner.exact


def test_options_that_cannot_be_served_are_errors(tiny_runner: Build) -> None:
    with pytest.raises(ValueError, match="auto or one of float32, bfloat16"):
        tiny_runner(dtype="int8")
    with pytest.raises(ValueError, match="device nonsense"):
        tiny_runner(device="nonsense")
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16


def test_warm_up_changes_no_answer_and_close_lets_go(tiny_runner: Build) -> None:
    expected = singles(tiny_runner())
    config = tiny_model_config()
    options = RunnerOptions(dtype="float32", device="cpu", block_size=4, num_blocks=64)
    runner = RUNNERS["torch"](config, tiny_weights(config), options, "0" * 64)
    assert isinstance(runner, TorchRunner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.warm_up()
    assert_same(singles(runner), expected)
    runner.close()
    with pytest.raises(AttributeError):
        runner.run(make_batch([Piece(tokens=[1], blocks=[0])]))


def test_the_last_position_of_the_model_can_be_computed(tiny_runner: Build) -> None:
    """No table of positions is one too short."""
    config = replace(tiny_model_config(), max_model_len=16, position=Position.LEARNED)
    runner = tiny_runner(config, tiny_weights(config))
    output = runner.run(make_batch([Piece(tokens=[1] * 16, count=16, blocks=range(4))]))
    assert output.tokens_R.shape == (1,)
