"""Encoders: each family against transformers, order and batch, pooling, classifiers, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from model.attention_maps import AttentionMaps
from model.checkpoint import CheckpointError, open_checkpoint
from model.runners import RunnerOptions
from model.runners.choose import choose_runner
from model.runners.encoding import Encoding, EncodingRunner, is_encoder, load_encoder
from tests.support.builders import slowly

pytestmark = pytest.mark.slow

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
ROWS = 131
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 96,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": ROWS,
    "dim": 48,
    "hidden_dim": 64,
    "n_layers": 3,
    "n_heads": 3,
    "max_position_embeddings": 96,
}
QWEN3 = {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None}
HEAD = {"num_labels": 3}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "AutoModel", {}),
    "bert-relu": ("bert", "AutoModel", {"hidden_act": "relu"}),
    "bert-masked": ("bert", "AutoModelForMaskedLM", {}),
    "bert-labels": ("bert", "AutoModelForSequenceClassification", HEAD),
    "bert-score": ("bert", "AutoModelForSequenceClassification", {"num_labels": 1}),
    "roberta": ("roberta", "AutoModel", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta-labels": ("xlm-roberta", "AutoModelForSequenceClassification", HEAD),
    "distilbert": ("distilbert", "AutoModel", {}),
    "distilbert-labels": ("distilbert", "AutoModelForSequenceClassification", HEAD),
    "modernbert": ("modernbert", "AutoModel", {"local_attention": 8}),
    "modernbert-biased": (
        "modernbert",
        "AutoModelForSequenceClassification",
        {
            **HEAD,
            "local_attention": 6,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
        },
    ),
    "nomic": ("nomic_bert", "AutoModel", {}),
    "qwen3": ("qwen3", "AutoModel", QWEN3),
}
LENGTHS = (1, 2, 7, 16, 17, 33, 60)


def reference(kind: str, **sizes: int) -> Any:
    """A random model of transformers, with biases and norms that are not all 0 and 1."""
    import transformers

    family, head, fields = KINDS[kind]
    sizes = {**(DISTILBERT if family == "distilbert" else SIZES), **sizes}
    defaults = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "dtype": "float32"}
    config = transformers.AutoConfig.for_model(family, **{**defaults, **sizes, **fields})
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0, 1.0 if "embed" in name else 0.2)
    return model


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer of a few letters, as BERT's are."""
    write_wordpiece(folder, VOCABULARY)


def write_wordpiece(folder: Path, vocabulary: list[str], *, lowercase: bool = True) -> None:
    """A tokenizer of BERT whose vocabulary begins with [PAD], [UNK], [CLS] and [SEP]."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(vocabulary[:4])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_modules(folder: Path, pooling: dict[str, Any], *, kinds: tuple[str, ...] = ()) -> None:
    parts = ["Transformer", "Pooling", *kinds]
    modules = [
        {"idx": i, "path": "" if i == 0 else f"{i}_{part}", "type": f"sentence_transformers.{part}"}
        for i, part in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def inputs(seed: int = 0, *, types: bool = False) -> list[Encoding]:
    rng = np.random.default_rng(seed)
    found = []
    for length in LENGTHS:
        ids = tuple(rng.integers(4, ROWS, length).tolist())
        kinds = tuple(np.sort(rng.integers(0, 2, length)).tolist()) if types else None
        found.append(Encoding(ids, kinds))
    return found


def expected_of(theirs: Any, encoding: Encoding) -> Any:
    """What transformers computes of one input: logits, or the mean of the states."""
    types = {} if encoding.types is None else {"token_type_ids": torch.tensor([encoding.types])}
    with torch.no_grad():
        output = theirs(torch.tensor([encoding.ids]), output_hidden_states=True, **types)
    if theirs.config.architectures[0].endswith("ForSequenceClassification"):
        return output.logits[0].numpy()
    return output.hidden_states[-1][0].mean(dim=0).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that embeds, mean-pooled."""
    path = tmp_path_factory.mktemp("bert")
    reference("bert").save_pretrained(path)
    write_tokenizer(path)
    return path


def load(folder: Path, **options: Any) -> EncodingRunner:
    return load_encoder(folder, **{"dtype": "float32", "threads": 1, **options})[0]


RUNNERS = ("native", "torch")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    """Within 1e-5, for inputs of all lengths and, in BERT, of two types of tokens."""
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    theirs.config.architectures = [type(theirs).__name__]
    write_tokenizer(tmp_path)
    if kind == "qwen3":
        write_modules(tmp_path, {"pooling_mode_mean_tokens": True})
    assert is_encoder(tmp_path)
    batch = inputs(types=kind.startswith(("bert", "nomic")))
    expected = [expected_of(theirs, encoding) for encoding in batch]
    assert np.abs(expected).max() > 0.05, "a reference that says nothing would equal anything"
    for name in RUNNERS:
        runner = load(tmp_path, runner=name)
        for ours, reference_vector in zip(runner.encode(batch), expected, strict=True):
            np.testing.assert_allclose(ours, reference_vector, atol=1e-5, rtol=1e-5)
        runner.close()


@pytest.mark.parametrize("name", RUNNERS)
def test_bits_depend_on_no_batch_and_no_order(folder: Path, name: str) -> None:
    """1,000 random batches of random inputs, with repetitions, against each input alone.

    By two threads: which of them computes what differs from call to call.
    """
    runner = load(folder, runner=name, threads=2 if name == "native" else 1)
    texts = inputs(1)
    alone = [runner.encode([text])[0].tobytes() for text in texts]
    rng = np.random.default_rng(2)
    most = 30 if name == "native" else 3  # steps of the native runner end at 1,024 tokens
    for _ in range(1000):
        picked = rng.integers(0, len(texts), rng.integers(1, most + 1)).tolist()
        found = runner.encode([texts[index] for index in picked])
        assert [vector.tobytes() for vector in found] == [alone[index] for index in picked]


@pytest.mark.parametrize(
    ("config", "pick"),
    [
        ({"pooling_mode_cls_token": True}, lambda states: states[0]),
        ({"pooling_mode_lasttoken": True}, lambda states: states[-1]),
        ({"pooling_mode": "mean"}, lambda states: states.mean(axis=0)),
    ],
)
@pytest.mark.parametrize("kinds", [(), ("Normalize",)])
def test_pools_as_the_files_say(
    folder: Path, tmp_path: Path, config: dict[str, Any], pick: Any, kinds: tuple[str, ...]
) -> None:
    """States of single tokens are those that CLS and last-token pooling give of the same input."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    text = inputs(3)[3]
    from transformers import AutoModel

    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder)(torch.tensor([text.ids]))
    expected = pick(theirs.last_hidden_state[0].numpy())
    write_modules(tmp_path, config, kinds=kinds)
    runner = load(tmp_path, runner="torch")
    native = load(tmp_path, runner="native")
    if kinds:
        expected = expected / np.linalg.norm(expected)
    assert runner.info.normalised == bool(kinds)
    np.testing.assert_allclose(runner.encode([text])[0], expected, atol=1e-5)
    np.testing.assert_allclose(native.encode([text])[0], expected, atol=1e-5)


def test_what_the_files_say_of_prompts_and_lengths(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    write_modules(tmp_path, {"pooling_mode_mean_tokens": True})
    settings = {"prompts": {"query": "a "}, "default_prompt_name": "query"}
    settings |= {"similarity_fn_name": "dot"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    runner, tokenizer = load_encoder(tmp_path, dtype="float32")
    info = runner.info
    assert (info.prompts, info.default_prompt) == ({"query": "a "}, "query")
    assert (info.similarity, info.max_tokens, info.has_head) == ("dot", 10, False)
    assert tokenizer.max_tokens == 10
    with pytest.raises(ValueError, match="from 1 to 10 tokens"):
        runner.encode([Encoding((2,) * 11)])


WRONG: list[tuple[str, Any, str]] = [
    ("modules.json", {}, "not a JSON list"),
    ("modules.json", [{"type": "a.Dense", "path": "2_Dense"}], "'Dense' is not supported"),
    ("modules.json", [{"type": "a.Transformer", "path": "../x"}], "outside"),
    ("modules.json", [{"type": "a.Pooling", "path": "1_Pooling"}], "one Transformer"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "one of the modes"),
    ("1_Pooling/config.json", {}, "one of the modes"),
    ("1_Pooling/config.json", {"pooling_mode": "cls", "include_prompt": False}, "include_prompt"),
    ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length"),
    ("config_sentence_transformers.json", {"prompts": [1]}, "prompts must be"),
    ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "x"}, "similarity_fn_name"),
]


@pytest.mark.parametrize(("file", "content", "message"), WRONG)
def test_wrong_files_are_refused(
    folder: Path, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    write_modules(tmp_path, {"pooling_mode_mean_tokens": True})
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding(()), "from 1 to 96 tokens"),
        (Encoding((5,) * 97), "from 1 to 96 tokens"),
        (Encoding((ROWS,)), f"from 0 to {ROWS - 1}"),
        (Encoding((-1,)), f"from 0 to {ROWS - 1}"),
        (Encoding((5,), (2,)), "token types must be from 0 to 1"),
        (Encoding((5, 5), (0,)), "token types must be from 0 to 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(folder: Path, encoding: Encoding, message: str) -> None:
    runner = load(folder)
    with pytest.raises(ValueError, match=message):
        runner.encode([Encoding((5,)), encoding])


def test_tokens_and_types_of_texts_and_pairs(folder: Path) -> None:
    _, tokenizer = load_encoder(folder, dtype="float32")
    text = tokenizer.encode("ab c [SEP]")
    unknown = VOCABULARY.index("[UNK]")
    names = [tokenizer.token_text(id_) for id_ in text.ids]
    assert names == ["[CLS]", "a", "##b", "c", "[UNK]", "[UNK]", "[UNK]", "[SEP]"]
    assert text.types is None
    assert unknown in text.ids
    assert tokenizer.encode("").ids == (2, 3)
    pair = tokenizer.encode_pair("a b", "c")
    assert pair.types == (0, 0, 0, 0, 1, 1)
    assert (tokenizer.num_special, tokenizer.num_special_of_pair) == (2, 3)
    assert tokenizer.encode_batch(["a b", "c"]) == [tokenizer.encode("a b"), tokenizer.encode("c")]
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("sizes", [(8, 2), (2, 8), (8, 8), (7, 8), (1, 9), (0, 9), (9, 0), (1, 1)])
@pytest.mark.parametrize("limit", [5, 9, *slowly(4, 8, 30)])
def test_the_longer_text_of_a_pair_is_cut_first(
    folder: Path, sizes: tuple[int, int], limit: int
) -> None:
    """As one token after the other is taken from the longer text, or of equal ones the second."""
    _, tokenizer = load_encoder(folder, dtype="float32")
    a, b = sizes
    found = tokenizer.encode_pair("a " * a, "b " * b, truncate_to=limit).ids
    while a + b + 3 > limit:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert found == (2, *(4,) * a, 3, *(5,) * b, 3)
    text = tokenizer.encode("a " * 9, truncate_to=limit)
    assert text.ids == (2, *(4,) * min(9, limit - 2), 3)
    with pytest.raises(ValueError, match="above 2"):
        tokenizer.encode("a", truncate_to=2)


def test_labels_problem_and_scores_of_a_classifier(tmp_path: Path) -> None:
    reference("bert-labels").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    info = load(tmp_path).info
    assert info.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert (info.problem, info.has_head, info.scores_pairs) == (
        "single_label_classification", True, False,
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "no", "2": "yes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="id2label"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["Identity", "Sigmoid", None])
def test_a_cross_encoders_score(tmp_path: Path, name: str | None) -> None:
    reference("bert-score").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if name:
        config["sentence_transformers"] = {"activation_fn": f"torch.nn.modules.{name}"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = load(tmp_path).info
    assert (info.scores_pairs, info.sigmoid) == (True, name != "Identity")


def test_an_encoders_attention_map_has_whole_rows(folder: Path) -> None:
    maps = AttentionMaps(open_checkpoint(folder))
    rows = maps.read([2, 5, 6, 3])
    assert [len(row) for row in rows] == [4] * 4
    np.testing.assert_allclose(np.sum(rows, axis=1), 1, atol=1e-5)
    assert rows[0][3] > 0


def test_an_encoder_generates_no_text(folder: Path) -> None:
    from model.checkpoint import configure

    _, config = configure(open_checkpoint(folder))
    with pytest.raises(ValueError, match="bert is an encoder, which generates no text"):
        choose_runner("auto", config, RunnerOptions(device="cpu"))
