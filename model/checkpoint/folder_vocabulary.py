"""The vocabulary of a folder: tokenizer.json, tokenizer_config.json and the end-of-text ids.

Byte-level and SentencePiece-like models of the `tokenizers` library; without tokenizer.json, files
of SentencePiece. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.checkpoint import CheckpointError
from model.checkpoint.json_file import read_json
from model.checkpoint.sentencepiece_file import Described, Splitting, describe
from model.checkpoint.token_bytes import Decode, byte_level, byte_table, sentencepiece
from model.checkpoint.vocabulary import END_OF_TURN, MAX_VOCABULARY, Special, Vocabulary

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def from_folder(folder: Path) -> Vocabulary:
    """Reads the vocabulary of a folder. Raises CheckpointError."""
    found = _described(folder)
    settings = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    model = _optional_json(folder / "config.json")
    body = _with_stated_ids(_with_special_ends(found.text.body))
    whole = build(body)
    known = whole.get_vocab(with_added_tokens=True)
    rows = _id_or_zero(model.get("vocab_size"))
    size = max(rows, max(known.values(), default=-1) + 1)
    if not 0 < size <= MAX_VOCABULARY:
        raise CheckpointError(f"a vocabulary has between 1 and {MAX_VOCABULARY} tokens")
    added = whole.get_added_tokens_decoder()
    specials = {
        token.content: Special(id=id_, lstrip=token.lstrip, rstrip=token.rstrip)
        for id_, token in added.items()
        if token.special and token.content
    }
    read = readable(body, specials.keys() | found.text.unread)
    first = whole if read is body else build(read)
    rest = _without_leading_blank(read)
    target = None
    if found.target is not None:
        target = build(readable(found.target.body, specials.keys() | found.target.unread))
    names = {**found.names, **_names(settings)}
    bos_id = known.get(names.get("bos_token", ""))
    ends = {known[names["eos_token"]]} if names.get("eos_token") in known else set()
    ends |= {specials[text].id for text in END_OF_TURN & specials.keys()}
    for source in (generation, model):
        ends |= _ids(source.get("eos_token_id"))
    plain = {token: id_ for token, id_ in known.items() if id_ not in added}
    literal = {token.content: id_ for id_, token in added.items() if not token.special}
    return Vocabulary(
        first=first,
        rest=first if rest == read else build(rest),
        size=size,
        token_bytes=byte_table(plain, literal, size=size, decode=_decoding(body)),
        specials=specials,
        add_bos=_adds_bos(whole, settings, bos_id),
        bos_id=bos_id,
        eos_ids=frozenset(id_ for id_ in ends if id_ < (rows or size)),
        chat_template=_template(folder, settings),
        names=names,
        target=target,
    )


def _described(folder: Path) -> Described:
    path = folder / "tokenizer.json"
    return Described(text=Splitting(read_json(path))) if path.exists() else describe(folder)


def _with_special_ends(body: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer with the added tokens that end a turn marked as special."""
    added = body.get("added_tokens")
    if not isinstance(added, list):
        return body
    marked = [
        {**token, "special": True}
        if isinstance(token, dict) and token.get("content") in END_OF_TURN
        else token
        for token in added
    ]
    return {**body, "added_tokens": marked}


def _with_stated_ids(body: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer with its added tokens at the ids that the file gives them.

    The library numbers added tokens in order, behind the model's; only a token of the model keeps
    its own id.
    """
    if not _misplaced(body):
        return body
    model, added = body["model"], body["added_tokens"]
    if isinstance(model.get("vocab"), dict):
        stated = {token["content"]: token["id"] for token in added}
        body = {**body, "model": {**model, "vocab": {**stated, **model["vocab"]}}}
    wrong = _misplaced(body)
    if wrong:
        raise CheckpointError(f"tokenizer.json: the added token {wrong[0][:80]!r} has no free id")
    return body


def _misplaced(body: Mapping[str, Any]) -> list[str]:
    """Added tokens that the library would give another id than the file does."""
    tokenizer = build(body)
    return [
        token["content"]
        for token in body.get("added_tokens") or ()
        if token["content"] and tokenizer.token_to_id(token["content"]) != token["id"]
    ]


def build(body: Mapping[str, Any]) -> Tokenizer:
    """The library's tokenizer; special tokens in a text are text. Raises CheckpointError."""
    try:
        tokenizer = Tokenizer.from_str(json.dumps(body))
    except Exception as error:  # noqa: BLE001  (the library raises plain Exception for bad input)
        raise CheckpointError(f"tokenizer.json: {str(error)[:200]}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def readable(body: dict[str, Any], hidden: Collection[str]) -> dict[str, Any]:
    """The same tokenizer for text, which never becomes one of the `hidden` tokens.

    A BPE model loses the merges into these. In a Unigram model a blank is put before them: no text
    has one behind the normalizer.
    """
    model = body["model"]
    merges, vocab = model.get("merges") or (), model.get("vocab")
    if isinstance(vocab, list):
        literal = [token for token in body.get("added_tokens") or () if not token["special"]]
        unread = set(hidden) - {token["content"] for token in literal}
        pieces = [[f" {text}" if text in unread else text, score] for text, score in vocab]
        return {**body, "model": {**model, "vocab": pieces}, "added_tokens": literal}
    if not merges or not isinstance(vocab, dict) or vocab.keys().isdisjoint(hidden):
        return body
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    kept = [merge for merge, pair in zip(merges, pairs, strict=True) if "".join(pair) not in hidden]
    return {**body, "model": {**model, "merges": kept}}


def _without_leading_blank(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that is not a prompt's first: no blank is put before it."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    splitter = copy.get("pre_tokenizer") or {}
    for step in (splitter, *splitter.get("pretokenizers", ())):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
    return copy


def _adds_bos(tokenizer: Tokenizer, settings: Mapping[str, Any], bos_id: int | None) -> bool:
    stated = settings.get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    return bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id]


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for name in _NAMED:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[name] = text
    return names


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        template = settings.get("chat_template")
    except (OSError, UnicodeDecodeError):
        raise CheckpointError("chat_template.jinja: cannot be read") from None
    if isinstance(template, list):  # several, by name
        named = [item for item in template if isinstance(item, dict)]
        template = next((i.get("template") for i in named if i.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _decoding(body: Mapping[str, Any]) -> Decode:
    """How a token's text becomes bytes: by GPT-2's alphabet, or SentencePiece's conventions."""
    steps = json.dumps([body.get("decoder"), body.get("pre_tokenizer")])
    if '"ByteLevel"' in steps:
        return byte_level
    if '"Metaspace"' in steps or '"ByteFallback"' in steps:
        return sentencepiece
    raise CheckpointError("tokenizer.json: neither byte-level nor SentencePiece-like")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _ids(value: object) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {id_ for id_ in values if type(id_) is int and id_ >= 0}


def _id_or_zero(value: object) -> int:
    return value if type(value) is int else 0
