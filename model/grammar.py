"""Grammars: what an answer must match, and which tokens may come next. Torch-free.

A grammar travels as one string, its *notation*: a kind, a colon and a text. Make one with

    json_schema_grammar(schema)   JSON that the schema allows; whitespace within it is bounded
    json_object_grammar()         any JSON object
    regex_grammar(pattern)        text that a regular expression (Rust's syntax) matches as a whole
    choice_grammar(texts)         one of some texts
    gbnf_grammar(text)            llama.cpp's dialect of BNF, from its rule `root`
    lark_grammar(text)            llguidance's dialect of Lark, from its rule `start`; `%json {...}`
                                  within it stands for JSON of that schema: `json_text(schema)`

These functions check almost nothing: a notation is validated by compiling it, with `Grammars` here
or, in the API, in a child process (see `model.grammar_validator`).

    Grammars   compiles notations over one vocabulary and keeps the latest
    Matcher    the state of one answer in its grammar

The only module that uses llguidance. Its automaton reads bytes, so any tokenisation of a match is
allowed; a token is forced only if it is the only one allowed. That bounds the work of a step: a
run of a million forced bytes would otherwise be expanded at once. `_LIMITS` bounds the work of one
mask to milliseconds; the engine's guide bounds the time of a whole answer. It chooses no tokens.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

if TYPE_CHECKING:
    from model.batch import Words

# Between two tokens of JSON: nothing, a blank, or a line's end and the next line's indentation. A
# model without more content would otherwise continue with blanks.
_WHITESPACE = r"( |\n[ \t]{0,40})?"
_OPTIONS = {"whitespace_pattern": _WHITESPACE}
_OPTIONS_KEY = "x-guidance"
_HEAD = '%llguidance {"no_forcing": true}\n'
# Exceeding a limit raises GrammarError, at the same token on every machine. llguidance compares a
# new item with all others in its row, so a mask costs up to step_max_items * max_items_in_row ** 2
# comparisons: at most 25 ms were measured with these, 2 s with rows of 4,000. JSON needs 4 items in
# a row and 56 in a step for each optional property that may come next: 150 of them fit.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=700,
    step_max_items=10_000,
    step_lexer_fuel=50_000,  # 14,000 are about a millisecond
    max_lexer_states=30_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """An invalid or too large grammar, or an answer that does not match its grammar."""


# --- notations


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that a JSON schema allows."""
    return f"json:{json.dumps(schema, separators=(',', ':'))}"


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """Text that the pattern matches from its first character to its last."""
    return f"regex:{pattern}"


def choice_grammar(texts: Sequence[str]) -> str:
    """One of the texts."""
    return f"choice:{json.dumps(list(texts), separators=(',', ':'))}"


def lark_grammar(text: str) -> str:
    """What the rule `start` of a grammar in llguidance's dialect of Lark derives."""
    return f"lark:{text}"


def json_text(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """The operand of `%json` in a Lark grammar, for JSON that the schema allows.

    `lenient` ignores keywords and formats that are not supported.
    """
    options = {**_OPTIONS, "lenient": True} if lenient else _OPTIONS
    return json.dumps({**schema, _OPTIONS_KEY: options}, separators=(",", ":"))


def lark_regex(pattern: str) -> str:
    """A regular expression (Rust's syntax) as a terminal in a Lark grammar. Raises GrammarError."""
    try:
        return f"/{llguidance.regex_to_lark(pattern, '')}/"
    except ValueError:
        raise GrammarError("not a regular expression") from None


def gbnf_grammar(text: str) -> str:
    """The same in llama.cpp's notation, from its rule `root`."""
    return f"gbnf:{text}"


def _as_lark(notation: str) -> str:
    """Converts every kind to Lark, the only one in which forcing can be switched off."""
    kind, _, text = notation.partition(":")
    try:
        match kind:
            case "json" if isinstance(schema := json.loads(text), dict):
                return f"{_HEAD}start: %json {json_text(schema)}"
            case "regex" if text:
                return f"{_HEAD}start: /{llguidance.regex_to_lark(text, '')}/"
            case "choice" if words := [_quoted(word) for word in json.loads(text)]:
                return f"{_HEAD}start: CHOICE\nCHOICE: {' | '.join(words)}"
            case "gbnf":
                return _HEAD + gbnf_to_lark(text).removeprefix("%llguidance {}")
            case "lark" if "%llguidance" not in text:
                return _HEAD + text
    except (ValueError, TypeError, IndexError, RecursionError, GbnfToLarkError):
        pass
    raise GrammarError("not the notation of a grammar")


def _quoted(word: str) -> str:
    """A string of Lark; characters that are no ASCII stand for themselves in it."""
    return json.dumps(word, ensure_ascii=False)


# --- compiled


class _Tokens:
    """The vocabulary, in the shape that llguidance reads."""

    bos_token_id = None

    def __init__(self, token_bytes: Sequence[bytes], eos_ids: Sequence[int]) -> None:
        # Without a name of its own each special token would be taken for every other one.
        self.tokens = [text or b"\xff[%d]" % id_ for id_, text in enumerate(token_bytes)]
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = [id_ for id_, text in enumerate(token_bytes) if not text]

    def __call__(self, text: bytes | str) -> list[int]:
        """Only asked for what is forced; nothing is."""
        raise NotImplementedError


class Grammars:
    """Compiles notations over one vocabulary, keeps the latest and what is wrong with them.

    `token_bytes` are those of the network's `vocab_size` ids. An answer may end, with any of
    `eos_ids`, only when its grammar is fulfilled. May be used by several threads at once.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        eos_ids: frozenset[int],
        vocab_size: int,
        kept: int = 64,
    ) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = token_bytes[:vocab_size]
        self.eos_ids = frozenset(id_ for id_ in eos_ids if id_ < vocab_size)
        self._num_kept = kept
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, llguidance.LLMatcher | GrammarError] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self, notation: str) -> None:
        """Compiles a grammar ahead of `matcher`: milliseconds to seconds. Any thread."""
        self._find(notation)

    def matcher(self, notation: str) -> Matcher:
        """The beginning of an answer.

        Raises GrammarError for what is no grammar, or one that no answer can match.
        """
        compiled = self._find(notation)
        if isinstance(compiled, GrammarError):
            raise GrammarError(*compiled.args)
        return Matcher(compiled)

    def _find(self, notation: str) -> llguidance.LLMatcher | GrammarError:
        with self._lock:
            if notation in self._kept:
                self._kept.move_to_end(notation)
                return self._kept[notation]
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
        compiled = self._build(notation, self._tokenizer)
        with self._lock:
            self._kept[notation] = compiled
            while len(self._kept) > self._num_kept:
                self._kept.popitem(last=False)
        return compiled

    def _make_tokenizer(self) -> llguidance.LLTokenizer:
        if not self.eos_ids:
            raise GrammarError("the model has no token to end an answer with")
        eos_ids = sorted(self.eos_ids)
        tokens = llguidance.TokenizerWrapper(_Tokens(self.token_bytes, eos_ids))
        return llguidance.LLTokenizer(tokens, n_vocab=self.vocab_size, eos_token=eos_ids)

    def _build(
        self, notation: str, tokenizer: llguidance.LLTokenizer
    ) -> llguidance.LLMatcher | GrammarError:
        try:
            compiled = llguidance.LLMatcher(
                tokenizer, _as_lark(notation), log_level=0, limits=_LIMITS
            )
        except GrammarError as error:
            return error
        if compiled.is_error():
            return GrammarError(compiled.get_error())
        first = compiled.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            return GrammarError(first.get_error())
        return compiled


class Matcher:
    """The state of one answer in its grammar. Used by one thread at a time.

    It is a function of the tokens read. After a GrammarError it is of no further use.
    """

    def __init__(self, state: llguidance.LLMatcher) -> None:
        self._state = state.deep_copy()

    def copy(self) -> Matcher:
        """An independent matcher in the same state. Takes microseconds."""
        return Matcher(self._state)

    @property
    def ended(self) -> bool:
        """Whether nothing can follow: the answer is complete."""
        return self._state.is_stopped() and not self._state.is_error()

    @property
    def fulfilled(self) -> bool:
        """Whether the answer may end here."""
        return self._state.is_accepting()

    def read(self, token: int) -> None:
        """Appends a token to the answer. Raises GrammarError if it may not or cannot follow."""
        if not self._state.consume_token(token):
            raise GrammarError(self._state.get_error())

    def fill(self, mask_W: Words) -> None:
        """Writes which tokens may come next, bit by bit; at least one.

        Raises GrammarError if that takes too much work or, due to the grammar, none may.
        """
        self._state.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        self._check(is_empty=not mask_W.any())

    def bits(self) -> int:
        """The same as one number: bit i is token i."""
        bits = int.from_bytes(self._state.compute_bitmask(), "little")
        self._check(is_empty=not bits)
        return bits

    def _check(self, *, is_empty: bool) -> None:
        if self._state.is_error():
            raise GrammarError(self._state.get_error())
        if is_empty:
            raise GrammarError("no token can come next")

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many of the tokens may follow, one after another; none after a failure. Takes
        microseconds per token.
        """
        return self._state.validate_tokens(list(tokens))
