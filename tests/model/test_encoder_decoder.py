"""T5, BART and Marian against transformers, on tiny random checkpoints; and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import SourceBatch
from model.checkpoint import load_model
from model.encoder_decoder import EncoderDecoder
from model.families import family_of
from model.runners import RunnerOptions
from model.runners.choose import choose_runner
from model.runners.torch import TorchRunner
from tests.support.builders import Piece, make_batch

T5: dict[str, Any] = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 131,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-gated": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("bart", BART),
    "bart-scaled": (
        "bart",
        {**BART, "scale_embedding": True, "activation_function": "relu", "forced_bos_token_id": 5},
    ),
    "marian": (
        "marian",
        {
            **BART,
            "scale_embedding": True,
            "activation_function": "swish",
            "decoder_start_token_id": 0,
        },
    ),
}
SOURCES = [np.random.default_rng(seed).integers(3, 131, 5 + 14 * seed).tolist() for seed in (1, 2)]
TEXT = np.random.default_rng(0).integers(3, 131, 40).tolist()
DECODED = 8
BLOCK = 4


def reference(kind: str) -> Any:
    """A random model of transformers, with biases and norms that are not all 0 and 1."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    family, fields = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields, dtype="float32")
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            elif "embed_positions" not in name or family != "marian":
                parameter.copy_(
                    noise
                    * (
                        0.25
                        if "embed" in name or "shared" in name
                        else 0.1
                        if family == "t5"
                        else 0.2
                    )
                )
        if fields.get("tie_word_embeddings") is False:
            model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(model.shared.weight))
        if family != "t5":
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    model.generation_config.forced_bos_token_id = fields.get("forced_bos_token_id")
    return model


def _state(folder: Path, fields: dict[str, Any]) -> None:
    """Writes fields that this version of transformers leaves out of config.json; hubs have them."""
    stated = {"tie_word_embeddings", "forced_bos_token_id"} & fields.keys()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **{name: fields[name] for name in stated}}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, tmp_path: Path) -> None:
    """The same logits of whole texts, and the same greedy tokens if sources are encoded once and
    their answers decoded together, paged. Logits in float64: of these random networks float32
    keeps 5 digits.
    """
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    _state(tmp_path, KINDS[kind][1])
    loaded = load_model(tmp_path)
    ours = EncoderDecoder(loaded.config)
    ours.load_state_dict(loaded.weights)
    theirs.double()
    ours.double()
    for source in SOURCES:
        with torch.no_grad():
            expected = theirs(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([TEXT])
            ).logits[0]
            given = ours.logits(ours.translate(torch.tensor(TEXT), torch.tensor(source)))
        assert expected.std() > 0.1, "a reference that says nothing would equal anything"
        assert (given - expected).abs().max() < 1e-5

    theirs.float()
    theirs.generation_config.eos_token_id = theirs.generation_config.forced_eos_token_id = None
    with torch.no_grad():
        answers = [
            theirs.generate(
                torch.tensor([source]),
                max_new_tokens=DECODED,
                do_sample=False,
                num_beams=1,
            )[0].tolist()
            for source in SOURCES
        ]
    start = list(loaded.config.start_ids)
    options = RunnerOptions(dtype="float32", device="cpu", block_size=BLOCK, num_blocks=60)
    runner = TorchRunner(loaded.config, loaded.weights, options=options, digest=loaded.digest)
    runner.warm_up()
    assert all(answer[: len(start)] == start for answer in answers)
    assert decode(runner, start, DECODED + 1 - len(start)) == answers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("stated", [None, True, False], ids=["saved", "tied", "untied"])
@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_the_output_layer_is_the_checkpoints(
    family: str, own_head: bool, stated: bool | None, tmp_path: Path
) -> None:
    """Whatever config.json states of the head: transformers 5 calls all of them tied, older
    versions wrote the truth. Compared with what transformers makes of the same folder.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(1)
    fields = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": not own_head}
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model(family, **fields, dtype="float32")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.shared.weight.copy_(torch.randn_like(model.shared.weight))
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    model.save_pretrained(tmp_path)
    if stated is not None:
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config.pop("scale_decoder_outputs", None)
        path.write_text(json.dumps({**config, "tie_word_embeddings": stated}))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    loaded = load_model(tmp_path)
    assert ("head.weight" in loaded.weights) == own_head
    ours = EncoderDecoder(loaded.config)
    ours.load_state_dict(loaded.weights)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor([SOURCES[0]]), decoder_input_ids=torch.tensor([TEXT])
        ).logits[0]
        given = ours.logits(ours.translate(torch.tensor(TEXT), torch.tensor(SOURCES[0])))
    assert expected.std() > 0.1
    assert (given.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-3


def decode(runner: TorchRunner, start: list[int], num: int) -> list[list[int]]:
    """Greedy answers to all sources, decoded together; the first step encodes the sources."""
    texts = [list(start) for _ in SOURCES]
    own = [range(20 * index, 20 * index + 10) for index in range(len(SOURCES))]
    table = np.zeros((len(SOURCES), 10), np.int32)
    for row in range(len(SOURCES)):
        table[row] = np.arange(20 * row + 10, 20 * row + 20)
    new = list(range(len(SOURCES)))
    count = len(start)
    for _ in range(num):
        pieces = [
            Piece(tokens=text, blocks=blocks, count=count)
            for text, blocks in zip(texts, own, strict=True)
        ]
        batch = make_batch(pieces, vocab_size=131)
        fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        tokens = [id_ for row in new for id_ in SOURCES[row]]
        fields["sources"] = SourceBatch(
            lens_S=np.array([len(source) for source in SOURCES], np.int32),
            table_SB=table,
            is_new_S=np.array([row in new for row in range(len(SOURCES))]),
            tokens_U=np.array(tokens, np.int32),
        )
        output = runner.run(type(batch)(**fields))
        count, new = 1, []
        for text, token in zip(texts, output.tokens_R.tolist(), strict=True):
            text.append(token)
    return texts


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("t5", {"feed_forward_proj": "gated-swish"}, "feed_forward_proj"),
        ("t5", {"eos_token_id": -1}, "eos_token_id"),
        ("bart", {"normalize_before": True}, "normalize_before"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder"),
        ("marian", {"d_model": 49}, "d_model"),
    ],
)
def test_refuses_what_the_network_lacks(family: str, fields: dict[str, Any], named: str) -> None:
    whole = {"activation_function": "gelu", **(T5 if family == "t5" else BART), **fields}
    with pytest.raises(ValueError, match=named):
        family_of(family).configure(whole)


@pytest.mark.parametrize("name", ["native", "cuda"])
def test_other_runners_refuse(name: str) -> None:
    config = family_of("t5").configure(T5)
    with pytest.raises(ValueError, match="only the torch runner"):
        choose_runner(name, config, RunnerOptions(device="cpu"))
    with pytest.raises(ValueError, match="tensor parallelism"):
        choose_runner("torch", config, RunnerOptions(device="cpu"), num_ranks=2)
    assert choose_runner("auto", config, RunnerOptions(device="cpu")).name == "torch"
