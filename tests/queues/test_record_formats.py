"""The formats of stored records, as a contract between versions.

`tests/queues/golden/records.json` has, for each kind of record, every format that was ever
written, the newest last. All of them must be readable, also with fields that a later version may
add. If a format changes on purpose, `python -m tests.queues.test_record_formats` appends it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from service.api.generation.manifest import (
    DecisionNote,
    EncodingNote,
    Endpoint,
    Manifest,
    PromptNote,
    QuestionNote,
    ReasoningNote,
    ToolNote,
)
from service.errors import Unavailable
from service.messages import (
    EncodingInputs,
    End,
    FinishReason,
    GenerationRequest,
    Record,
    SamplingParams,
    Thinking,
    TokenLogprob,
    Tokens,
)
from service.queues.contract import EngineInfo
from service.queues.redis.codec import (
    UNKNOWN_REASON,
    decode_entry,
    decode_ids,
    encode_end,
    encode_tokens,
)
from service.queues.redis.registry import encode_report

GOLDEN = Path(__file__).parent / "golden" / "records.json"

# In these samples no field has its default: a new field must be set here, too.
REQUEST = GenerationRequest(
    id="s0-0123456789abcdef.1",
    prompt_ids=(1, 300, 70_000),
    sampling=SamplingParams(
        seed=2**64 - 1, choice=1, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05,
        presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.1,
        logit_bias=((5, -100.0), (7, 1.5)), banned=((5, 300), (7,)), allowed=(5, 9),
        top_logprobs=3,
    ),
    max_tokens=64, min_tokens=2, stop=("\n\n", "é"), include_stop=True,
    skip_special_tokens=False, stop_token_ids=(2, 3), ignore_eos=True,
    prediction=(7, 300), prompt_logprobs=1,
    grammar='start: "a"',
    thinking=Thinking(
        format="mistral", opened=True, verbatim=True, openings=((9,),), joint=(4,), closing=(7, 8),
        symbols=(("[THINK]", 9),), budget=64,
    ), tenant="alice", priority=2, timeout_ms=5000,
    trace="00-0123456789abcdef0123456789abcdef-0123456789abcdef-01", model="0123456789abcdef",
    encoding=EncodingInputs(lengths=(2, 1), firsts=(1, 1), width=384), source=1,
    scored=((5, 9), (7,)),
)  # fmt: skip
MANIFEST = Manifest(
    endpoint=Endpoint.CHAT, model="model", model_key="k", fingerprint="class-1",
    created=1_700_000_000,
    prompts=(PromptNote(num_tokens=3, text="né", ids=(1, 300, 70_000)),), width=3, keep=2,
    stream=True, logprobs=2, prompt_logprobs=1, echo=True, return_token_ids=True,
    include_usage=True, continuous_usage=True, stop=("é", "\n"), notation="hermes", grace=30.0,
    reasoning=ReasoningNote(
        format="think", opened=True, verbatim=True, included=False
    ),
    sealed_reasoning=True,
    tokens_as_ids=True, prompt_only=True, skip_special_tokens=False, obfuscation=True,
    service_tier="default",
    tools=(ToolNote(name="run", custom=True, types=(("a", ("string", "null")),)),),
    encoding=EncodingNote(
        num_inputs=3, base64=True, dimensions=64, num_queries=1, top_n=2, documents=("é", "b"),
        activation=False, background=True,
    ),
    decision=DecisionNote(
        questions=(
            QuestionNote(
                type="choice", name="é", options=("a", True), paths=((0, 1),), ends=((2,),)
            ),
        ),
        num_inputs=3, background=True,
    ),
    given_back={"user": "u", "metadata": {"a": "b"}},
)  # fmt: skip
ENGINE = EngineInfo(
    id="e1", numeric_class="class-1", version="1.2.3", running=1, waiting=2, blocks_used=3,
    blocks_cached=4, blocks_free=5, max_model_len=8192, tokens_per_second=12.5,
    features=("grammar",), model="tiny", block_size=16,
)  # fmt: skip
TOKENS = Tokens(start=2, ids=(1, 300, 70_000), text="né", digest=123_456_789)
SCORED = Tokens(
    start=0,
    ids=(1, 300),
    text="a b",
    digest=7,
    logprobs=(TokenLogprob(-0.5, ((1, -0.5), (9, -1.25))), TokenLogprob(-1.0)),
    prompt_logprobs=(None, TokenLogprob(-2.0, ((4, -2.0),))),
)
FIRST = Tokens(start=0, ids=(1, 300), text="a b", digest=7, numeric_class="class-1")
END = End(
    count=9,
    reason=FinishReason.ERROR,
    cached_tokens=16,
    stopped_by="stop",
    error="some_code",
    ended_at=1_700_000_000,
)


def tokens_of(text: str, *, count: int = 5) -> Record:
    return decode_entry(f"{count}-0".encode(), {b"k": bytes.fromhex(text)})


def end_of(text: str) -> Record:
    return decode_entry(b"9-1", {b"e": text.encode()})


@dataclass(frozen=True)
class Kind:
    """`encode` returns the stored sample; tokens, which are binary, in hexadecimal."""

    sample: Any
    encode: Callable[[Any], str]
    decode: Callable[[str], Any]


KINDS = {
    "request": Kind(REQUEST, GenerationRequest.to_json, GenerationRequest.from_json),
    "manifest": Kind(MANIFEST, Manifest.to_json, Manifest.from_json),
    "engine": Kind(ENGINE, encode_report, EngineInfo.from_json),
    "tokens": Kind(TOKENS, lambda record: encode_tokens(record).hex(), tokens_of),
    "scored_tokens": Kind(
        SCORED, lambda record: encode_tokens(record).hex(), lambda text: tokens_of(text, count=2)
    ),
    "first_tokens": Kind(
        FIRST, lambda record: encode_tokens(record).hex(), lambda text: tokens_of(text, count=2)
    ),
    "end": Kind(END, lambda record: encode_end(record).decode(), end_of),
}
OBJECTS = ("request", "manifest", "engine")
"""Kinds that are a dataclass in JSON."""


def golden() -> dict[str, list[str]]:
    formats: dict[str, list[str]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return formats


def golden_records(*kinds: str) -> list[Any]:
    return [
        pytest.param(name, text, id=f"{name}-{index}")
        for name, formats in golden().items()
        if not kinds or name in kinds
        for index, text in enumerate(formats)
    ]


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def unset_fields(sample: Any) -> Iterator[str]:
    """Fields that have their default, within other dataclasses too."""
    for field in fields(sample):
        value = getattr(sample, field.name)
        if value == default_of(field):
            yield f"{type(sample).__name__}.{field.name}"
        for each in value if isinstance(value, tuple) else (value,):
            if is_dataclass(each):
                yield from unset_fields(each)


def as_of(sample: Any, record: Any) -> Any:
    """The sample as a record holds it: fields that its format lacks have their defaults."""
    if isinstance(sample, tuple) and any(is_dataclass(each) for each in sample):
        return tuple(as_of(*pair) for pair in zip(sample, record, strict=True))
    if not is_dataclass(sample):
        return sample
    known = {field.name: getattr(sample, field.name) for field in fields(sample)}
    kind: Any = type(sample)
    return kind(
        **{name: as_of(value, record[name]) for name, value in known.items() if name in record}
    )


def objects(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all objects in a record, but not of those within a free-form one."""
    if isinstance(record, dict) and path[-1:] != ("given_back",):
        yield path
        for name, value in record.items():
            yield from objects(value, (*path, name))
    if isinstance(record, list):
        for index, value in enumerate(record):
            yield from objects(value, (*path, index))


def at(record: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        record = record[step]
    return record


# --- today's formats ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_today_is_the_newest_golden_format(name: str) -> None:
    kind = KINDS[name]
    assert golden()[name][-1] == kind.encode(kind.sample), (
        "the stored format has changed: python -m tests.queues.test_record_formats appends it"
    )


@pytest.mark.parametrize("name", OBJECTS)
def test_the_samples_set_every_field(name: str) -> None:
    assert list(unset_fields(KINDS[name].sample)) == []


# --- records of an earlier version ----------------------------------------------------------------
@pytest.mark.parametrize(("name", "text"), golden_records())
def test_every_golden_format_is_read(name: str, text: str) -> None:
    kind = KINDS[name]
    expected = as_of(kind.sample, json.loads(text)) if name in OBJECTS else kind.sample
    assert kind.decode(text) == expected


@pytest.mark.parametrize("name", OBJECTS)
def test_optional_fields_may_be_missing(name: str) -> None:
    kind = KINDS[name]
    whole = json.loads(kind.encode(kind.sample))
    for field in fields(kind.sample):
        record = {key: value for key, value in whole.items() if key != field.name}
        if default_of(field) is MISSING:
            with pytest.raises((TypeError, Unavailable)):
                kind.decode(json.dumps(record))
        else:
            assert kind.decode(json.dumps(record)) == as_of(kind.sample, record)


# --- records of a later version -------------------------------------------------------------------
@pytest.mark.parametrize(("name", "text"), golden_records(*OBJECTS))
@pytest.mark.parametrize("value", [None, 1, "text", [1], {"a": {"b": []}}])
def test_unknown_fields_are_ignored(name: str, text: str, value: object) -> None:
    """One made an older process fail with a TypeError, and the request with it."""
    kind, expected = KINDS[name], KINDS[name].decode(text)
    paths = list(objects(json.loads(text)))
    assert len(paths) >= {"request": 2, "manifest": 2, "engine": 1}[name]
    for path in paths:
        record = json.loads(text)
        at(record, path)["of_a_later_version"] = value
        assert kind.decode(json.dumps(record)) == expected


@pytest.mark.parametrize(
    ("name", "text"), golden_records("tokens", "scored_tokens", "first_tokens")
)
def test_unknown_parts_of_tokens_are_ignored(name: str, text: str) -> None:
    kind, value = KINDS[name], bytes.fromhex(text)
    entry_id = f"{kind.sample.end}-0".encode()
    for flag in range(1, 8):
        later = bytes([value[0] | 1 << flag]) + value[1:] + b"\xff\x00later"
        fields = {b"k": later, b"m": b"more"}
        assert decode_entry(entry_id, fields) == kind.sample
        assert decode_ids(later) == kind.sample.ids
    if name == "scored_tokens":
        begin = value.index(b"{")
        later = value[:begin] + json.dumps({**json.loads(value[begin:]), "z": [1]}).encode()
        assert decode_entry(entry_id, {b"k": later}) == kind.sample


@pytest.mark.parametrize(("name", "text"), golden_records("end"))
def test_unknown_parts_of_an_end_are_ignored(name: str, text: str) -> None:
    later = json.dumps({**json.loads(text), "z": {"a": 1}})
    fields = {b"e": later.encode(), b"m": b"more"}
    assert decode_entry(b"9-1", fields) == KINDS[name].sample


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"r":"paused"}', UNKNOWN_REASON),
        ('{"r":"paused","x":"code"}', "code"),
        ("{}", UNKNOWN_REASON),
        ("[]", UNKNOWN_REASON),
        ("no JSON", UNKNOWN_REASON),
        ("", UNKNOWN_REASON),
        ('{"r":["stop"]}', UNKNOWN_REASON),
        ('{"r":"stop","c":"many"}', UNKNOWN_REASON),
    ],
)
def test_an_end_that_cannot_be_read_is_an_error(text: str, error: str) -> None:
    """It was dropped as malformed, and readers of the answer waited for its end without limit."""
    assert end_of(text) == End(count=9, reason=FinishReason.ERROR, error=error)


def test_a_manifest_of_a_later_endpoint_is_for_another_replica() -> None:
    text = MANIFEST.to_json().replace('"chat"', '"of_a_later_version"')
    with pytest.raises(Unavailable) as caught:
        Manifest.from_json(text)
    assert (caught.value.code, caught.value.retry_after) == ("version_mismatch", 2.0)


# --- malformed records ----------------------------------------------------------------------------
def wrong_values(value: object) -> tuple[object, ...]:
    """Of other types than `value`."""
    if isinstance(value, bool):
        return ("x", 1, {})
    if isinstance(value, str | dict):
        return (5, 1.5, True, [])
    if isinstance(value, list):
        ragged = len({len(item) for item in value if isinstance(item, list)}) > 1
        return ("x", 5, {}, [{}], [True], [["x"]] if ragged else [[1, 2, 3]])
    return ("x", True, [], {})


ALSO_RIGHT = {
    **{name: [[1, 2, 3]] for name in ("openings", "paths", "ends")},  # lists of lists
    "options": [True],
}


@pytest.mark.parametrize("name", OBJECTS)
def test_a_value_of_a_wrong_type_is_malformed(name: str) -> None:
    """It went on to the engine, which does not expect it."""
    kind = KINDS[name]
    text = kind.encode(kind.sample)
    for path in objects(json.loads(text)):
        for field, value in at(json.loads(text), path).items():
            for wrong in wrong_values(value):
                if field == "group" or wrong == ALSO_RIGHT.get(field):
                    continue  # a group is read by a script alone
                record = json.loads(text)
                at(record, path)[field] = wrong
                with pytest.raises((ValueError, TypeError, Unavailable)):
                    kind.decode(json.dumps(record))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '{"id":"x"}', '{"a":1e999}'])
@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_no_record_is_malformed(name: str, text: str) -> None:
    with pytest.raises((ValueError, TypeError, Unavailable)):
        KINDS[name].decode(text)


def test_integers_stand_for_floats_if_they_fit() -> None:
    record = json.loads(REQUEST.to_json())
    record["sampling"]["temperature"] = 1
    assert GenerationRequest.from_json(json.dumps(record)).sampling.temperature == 1.0
    record["sampling"]["temperature"] = 10**400
    with pytest.raises(ValueError, match="out of range"):
        GenerationRequest.from_json(json.dumps(record))


def extend() -> None:
    """Appends the formats of today to the golden file if they are not there."""
    formats = golden()
    for name, kind in KINDS.items():
        text = kind.encode(kind.sample)
        if formats.setdefault(name, [])[-1:] != [text]:
            formats[name].append(text)
    text = json.dumps(formats, indent=2, ensure_ascii=False)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    extend()
