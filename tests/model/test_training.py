"""Training: its attention, its steps, and that a stopped run goes on as if it had not stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.training import TrainingError
from model.training import network as network_module
from model.training.data import TokenBatch, epoch_order, hold_out, in_order, read_rows
from model.training.generate import Answers, Example
from model.training.loop import STATE, Recipe, StepReport, Training
from model.training.lowrank import LowRank, add_adapters
from model.training.network import (
    build_network,
    initialised,
    states,
    token_losses,
)
from model.training.pretrain import Corpus, Plan, read_documents, read_plan, train_vocabulary
from model.training.ranks import Ranks
from model.transformer import Transformer, fused_attention, plain_attention
from tests.model.training_models import tiny_base
from tests.support.builders import tiny_model_config, tiny_weights

CPU = torch.device("cpu")
SHAPES = {"alike": (2, 2), "grouped": (4, 2), "shared": (6, 1)}


def heads(kind: str, *, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and a gradient of the output: two texts of seven tokens."""
    H, K = SHAPES[kind]
    generator = torch.Generator().manual_seed(H)
    sizes = (H, K, K, H)
    return tuple(
        torch.randn(2, 7, size, 5, generator=generator, dtype=dtype).requires_grad_()
        for size in sizes
    )


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_gradient_of_attention_is_the_derivative_of_its_formula(
    kind: str, window: int | None
) -> None:
    """Both ways through attention, against derivatives written down. With P the weights and G the
    gradient of the output: dV = Pᵀ G, dS = P (G Vᵀ - sum(P G Vᵀ)), dQ = dS K s, dK = dSᵀ Q s.
    """
    q, k, v, gradient = heads(kind)
    H, K = SHAPES[kind]
    scale = 0.3
    with torch.no_grad():
        Q, G = (x.transpose(1, 2) for x in (q, gradient))
        keys, V = (x.transpose(1, 2).repeat_interleave(H // K, dim=1) for x in (k, v))
        ago = torch.arange(7)[:, None] - torch.arange(7)
        seen = (ago >= 0) & (ago < (window or 7))
        P = (Q @ keys.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        dP = G @ V.mT
        dS = P * (dP - (P * dP).sum(-1, keepdim=True))
        per_head = (dS @ keys * scale, dS.mT @ Q * scale, P.mT @ G)
        dQ = per_head[0].transpose(1, 2)
        dK, dV = (x.view(2, K, H // K, 7, 5).sum(2).transpose(1, 2) for x in per_head[1:])
    for attend in (plain_attention, fused_attention):
        mixed = attend(q, k, v, layer=0, scale=scale, window=window)
        given = torch.autograd.grad(mixed, (q, k, v), gradient)
        # The plain way computes its weights in float32.
        for mine, written in zip(given, (dQ, dK, dV), strict=True):
            torch.testing.assert_close(mine, written, atol=1e-6, rtol=1e-5)


FLAVOURS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "qkv_bias": True, "sliding_window": 3},
    "gpt2": {"position": "learned", "norm": "layer", "gated_mlp": False, "mlp_bias": True},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_padded_batch_has_the_states_of_each_text_alone(flavour: str) -> None:
    """Each text of the training forward, against the network's own forward of it alone."""
    config = tiny_model_config(**FLAVOURS[flavour])
    network = build_network(config, tiny_weights(config))
    rng = np.random.default_rng(3)
    texts = [torch.tensor(rng.integers(0, 97, length)) for length in (9, 4, 1)]
    rows = torch.zeros(3, 9, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    logits = network.logits(states(network, rows))
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row[: len(text)], network(text), atol=1e-4, rtol=1e-4)


def test_only_marked_tokens_are_learned() -> None:
    """The loss is the sum of -log p of the marked ones, and nothing else has a part in it."""
    config = tiny_model_config()
    network = build_network(config, tiny_weights(config))
    tokens = torch.tensor([[5, 9, 2, 7], [1, 4, 0, 0]])
    marked = torch.tensor([[False, False, True, True], [False, True, False, False]])
    logprobs = network(tokens).log_softmax(-1)
    expected = -(logprobs[0, 1, 2] + logprobs[0, 2, 7] + logprobs[1, 0, 4])
    torch.testing.assert_close(token_losses(network, tokens, marked), expected)


def random_examples(count: int, *, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 97, rng.integers(4, 12)).tolist() for _ in range(count)]
    return [Example(text, [range(2, len(text))]) for text in texts]


def a_run(
    recipe: Recipe, *, lowrank: LowRank | None = None, num_held: int = 4, seed: int = 0
) -> tuple[Transformer, Training]:
    """A tiny network in training on random texts; equal for equal arguments."""
    base = tiny_base("llama")
    network = build_network(base.config, {n: w.clone() for n, w in base.weights.items()})
    if lowrank is not None:
        add_adapters(network, base, lowrank, seed=seed)
    examples = random_examples(13)
    task = Answers(examples[num_held:], examples[:num_held], recipe, name="random")
    return network, Training(network, task, recipe, ranks=Ranks(CPU))


def no_report(_: StepReport) -> None: ...


def after(steps: int) -> Callable[[], bool]:
    """Becomes true after so many steps."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


RUNS: dict[str, tuple[Recipe, LowRank | None]] = {
    "full": (Recipe(steps=9, batch=2, learning_rate=1e-2), None),
    "accumulated": (Recipe(steps=7, batch=2, accumulate=3, learning_rate=1e-2), None),
    "adapters": (Recipe(steps=9, batch=3, learning_rate=1e-2), LowRank(rank=2)),
    "patient": (
        Recipe(steps=12, batch=4, learning_rate=0.3, evaluate_every=2, patience=2),
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(4,), (0, 1, 5), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    kind: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Bit for bit, and with the same reports: weights, moments, order and rate all go on."""
    recipe, lowrank = RUNS[kind]
    whole: list[StepReport] = []
    network, training = a_run(recipe, lowrank=lowrank)
    assert training.run(tmp_path, report=whole.append, stop=lambda: False)

    cut: list[StepReport] = []
    for number, steps in enumerate((*stops, recipe.steps)):
        again, training = a_run(recipe, lowrank=lowrank)
        if number:
            training.resume(tmp_path)
        finished = training.run(tmp_path, report=cut.append, stop=after(steps))
        assert finished == training.finished
        if finished:
            break
    assert cut == whole
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_is_resumed_as_it_was_started(tmp_path: Path) -> None:
    recipe = Recipe(steps=5, batch=2)
    _, training = a_run(recipe)
    training.run(tmp_path, report=no_report, stop=after(2))
    _, other = a_run(Recipe(steps=5, batch=3))
    with pytest.raises(TrainingError, match="its batch was 2 and is now 3"):
        other.resume(tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-7])
    with pytest.raises(TrainingError, match="no saved state"):
        a_run(recipe)[1].resume(tmp_path)


@pytest.mark.slow
def test_learns_one_small_batch_to_nothing(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    recipe = Recipe(steps=80, batch=9, learning_rate=1e-2, evaluate_every=80)
    _, training = a_run(recipe)
    training.run(tmp_path, report=reports.append, stop=lambda: False)
    assert reports[0].loss > 1
    assert reports[-1].loss < 0.01


class GivenBatches:
    """A task of given batches, again and again."""

    name = "given"

    def __init__(self, batches: list[TokenBatch]) -> None:
        self._batches = batches

    def batches(self, first: int) -> Iterator[TokenBatch]:
        while True:
            yield self._batches[first % len(self._batches)]
            first += 1

    def loss(self, network: Transformer, batch: TokenBatch) -> torch.Tensor:
        return token_losses(network, batch.tokens_NT, batch.targets)

    def evaluate(self, network: Transformer) -> Mapping[str, float]:
        return {}


@pytest.mark.slow
def test_accumulated_passes_are_one_large_batch(tmp_path: Path) -> None:
    """Of parts with unequal numbers of marked tokens: a mean of means would differ."""
    tokens = torch.randint(1, 97, (4, 8), generator=torch.Generator().manual_seed(0))
    marked = torch.zeros_like(tokens, dtype=torch.bool)
    marked[0, 2:] = marked[3, 7:] = marked[1, 5:] = True
    parts = [slice(0, 1), slice(1, 4)]
    lengths = torch.full((4,), 8)
    found = []
    for cut in ([slice(0, 4)], parts):
        batches = [
            TokenBatch(tokens_NT=tokens[at], lengths_N=lengths[at], targets=marked[at])
            for at in cut
        ]
        config = tiny_model_config()
        network = build_network(config, tiny_weights(config))
        recipe = Recipe(steps=3, accumulate=len(cut), learning_rate=1e-3)
        training = Training(network, GivenBatches(batches), recipe, ranks=Ranks(CPU))
        reports: list[StepReport] = []
        training.run(tmp_path, report=reports.append, stop=lambda: False)
        found.append([report.loss for report in reports])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] != pytest.approx(found[0][2], rel=1e-2)


def test_computes_in_bfloat16_what_it_computes_in_float32(tmp_path: Path) -> None:
    losses = {}
    for autocast in (False, True):
        base = tiny_base("qwen3")
        network = build_network(base.config, base.weights)
        recipe = Recipe(steps=1, batch=9)
        task = Answers(random_examples(9), [], recipe, name="random")
        training = Training(network, task, recipe, ranks=Ranks(CPU), autocast=autocast)
        reports: list[StepReport] = []
        training.run(tmp_path, report=reports.append, stop=lambda: False)
        losses[autocast] = reports[0].loss
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


@pytest.mark.parametrize(
    "anchor_ids", [frozenset[int](), frozenset({3})], ids=["causal", "anchors"]
)
def test_attention_on_a_cpu_stays_in_float32(
    anchor_ids: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In which its gradient is fast; the products around it are in bfloat16."""
    found: set[torch.dtype] = set()

    def recorded(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*heads: torch.Tensor, **options: Any) -> torch.Tensor:
            found.update(each.dtype for each in heads)
            return attend(*heads, **options)

        return call

    for name in ("fused_attention", "anchored_attention"):
        monkeypatch.setattr(network_module, name, recorded(getattr(network_module, name)))
    config = tiny_model_config()
    network = build_network(config, tiny_weights(config))
    products: set[torch.dtype] = set()
    product = network.get_submodule("blocks.0.attention.qkv")
    product.register_forward_hook(lambda *args: products.add(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        states(network, torch.arange(1, 9)[None], anchor_ids=anchor_ids)
    assert (found, products) == ({torch.float32}, {torch.bfloat16})


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, learning_rate=0.5, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == 0.5
    assert 0.05 <= rates[-1] < 0.06


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup": 2.0}, "warmup"),
        ({"clip": 0.0}, "clip"),
    ],
    ids=str,
)
def test_recipes_state_their_limits(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Recipe(**{"steps": 1, **values})


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_has_each_example_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, batch = int(rng.integers(1, 200)), int(rng.integers(1, 20))
    lengths = tuple(rng.integers(1, 50, count).tolist())
    per_epoch = -(-count // batch)
    order = in_order(lengths, batch=batch, seed=seed, first=0)
    whole = [next(order) for _ in range(2 * per_epoch)]
    for epoch in (whole[:per_epoch], whole[per_epoch:]):
        assert sorted(index for indices in epoch for index in indices) == list(range(count))
    later = in_order(lengths, batch=batch, seed=seed, first=per_epoch // 2)
    assert [next(later) for _ in range(per_epoch)] == whole[per_epoch // 2 :][:per_epoch]
    if count > 20:
        assert whole[:per_epoch] != whole[per_epoch:]
        first = epoch_order(lengths, batch=batch, seed=seed + 1, epoch=0)
        assert list(first) != whole[:per_epoch]


@pytest.mark.parametrize("seed", range(20))
def test_a_holdout_has_its_share_of_each_group(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [*rng.integers(0, 4, int(rng.integers(40, 90))).tolist(), 99]
    share = float(rng.uniform(0.1, 0.5))
    rest, held = hold_out(groups, share=share, seed=seed)
    assert sorted([*rest, *held]) == list(range(len(groups)))
    for group in set(groups) - {99}:
        size = sum(groups[index] == group for index in held)
        assert abs(size - share * groups.count(group)) <= 1
    assert groups.index(99) in rest, "the only example of a group is trained with"
    assert hold_out(groups, share=share, seed=seed) == (rest, held)


def test_too_few_rows_to_hold_some_out() -> None:
    with pytest.raises(TrainingError, match="--holdout 0"):
        hold_out(["a", "b"], share=0.5, seed=0)
    assert hold_out(["a", "b"], share=0.0, seed=0) == ([0, 1], [])


def test_rows_of_each_kind_of_file(tmp_path: Path) -> None:
    files = {
        "a.csv": 'text,label\n"one, two",x\n"three\nfour",y\n',
        "a.tsv": 'text\tlabel\none, two\tx\n"three\nfour"\ty\n',
        "a.jsonl": '{"text": "one, two", "label": "x"}\n\n{"text": "three\\nfour", "label": "y"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        rows = read_rows(tmp_path / name)
        assert rows == [
            {"text": "one, two", "label": "x"},
            {"text": "three\nfour", "label": "y"},
        ]


def test_rows_of_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pyarrow, imported for such files alone; without it the error names it."""
    read: list[Path] = []

    class Table:
        def to_pylist(self) -> list[dict[str, Any]]:
            return [{"text": "one", "label": 2}]

    def read_table(path: Path) -> Table:
        read.append(path)
        if path.name == "b.parquet":
            raise LookupError("the magic bytes are missing")
        return Table()

    path = tmp_path / "a.parquet"
    parts = {"parquet": SimpleNamespace(read_table=read_table), "ArrowException": LookupError}
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(**parts))
    assert read_rows(path) == [{"text": "one", "label": 2}]
    assert read == [path]
    with pytest.raises(TrainingError, match=r"b\.parquet: not a Parquet file"):
        read_rows(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TrainingError, match="pip install pyarrow"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "must be .csv"),
        ("a.csv", b"text\n", "no rows"),
        ("a.csv", b"text\n\xff\xfe\n", "not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2"),
        ("absent.csv", None, "No such file"),
    ],
    ids=str,
)
def test_files_that_cannot_be_read(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        read_rows(tmp_path / name)


def test_a_new_network_guesses_uniformly() -> None:
    config = tiny_model_config()
    network = initialised(config, seed=1)
    loss = token_losses(network, torch.arange(1, 60)[None], torch.ones(1, 59, dtype=torch.bool))
    assert float(loss.detach()) / 58 == pytest.approx(np.log(97), rel=0.02)
    again = initialised(config, seed=1)
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_vocabulary_gives_back_any_text() -> None:
    tokenizer = train_vocabulary(["the quick brown fox " * 20], 300)
    text = "a text of ünknown 文字, <|endoftext|> among it\n\t"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode(" quick brown").ids) < 6


def test_held_out_text_is_not_trained_with() -> None:
    documents = ["".join(chr(97 + int(c)) for c in np.random.default_rng(0).integers(0, 26, 3000))]
    tokenizer = train_vocabulary(documents, 300)
    plan = Plan(context=16, holdout=0.5, recipe=Recipe(steps=1, batch=200))
    corpus = Corpus(documents, tokenizer, plan)
    ids = tokenizer.encode_batch(documents, add_special_tokens=False)[0].ids
    trained = ids[: (len(ids) + 1) // 2]
    batch = next(corpus.batches(0))
    windows = {tuple(trained[at : at + 17]) for at in range(len(trained) - 16)}
    assert {tuple(row) for row in batch.tokens_NT.tolist()} <= windows
    assert batch.count == 200 * 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidth = 3", "has no 'width'"),
        ("[models]", r"tables are \[model\]"),
        ("[model]\nnum_layers = 'two'", "must be of type int"),
        ("[model]\nnum_heads = 5\nnum_kv_heads = 2", "multiple"),
        ("[model]\nvocab_size = 100", "vocab_size must be from 257"),
        ("[model]\nholdout = 1", "holdout"),
        ("[training]\nsteps = 0", "steps"),
        ("steps = ", "configuration"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(TrainingError, match=message):
        read_plan(tmp_path / "plan.toml")


def test_the_configuration_of_the_documentation_is_read() -> None:
    plan = read_plan(Path(__file__).parents[2] / "docs" / "tiny.toml")
    assert (plan.num_layers, plan.recipe.batch) == (3, 16)


def test_documents_are_a_file_a_folder_or_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.md").write_text("three")
    assert read_documents(str(tmp_path / "a.txt")) == ["one"]
    assert read_documents(str(tmp_path)) == ["one", "two", "three"]
    assert read_documents(str(tmp_path / "*.txt")) == ["one", "two"]
    with pytest.raises(TrainingError, match="no text"):
        read_documents(str(tmp_path / "*.rst"))


def test_a_text_shorter_than_a_window_is_refused() -> None:
    documents = ["a few words"]
    tokenizer = train_vocabulary(documents, 257)
    with pytest.raises(TrainingError, match="too few"):
        Corpus(documents, tokenizer, Plan(context=64))
