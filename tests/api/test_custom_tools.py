"""Custom tools: the grammar of an input holds in every format of calls, also as a JSON string."""

from __future__ import annotations

import json
import random
import re

import pytest

from model.grammar import lark_grammar, regex_grammar
from service.api.tools.chat import FunctionDefinition, InputFormat, ToolUse
from service.api.tools.custom import (
    UnsupportedGrammarError,
    embedded_lark,
    escaped_regex,
    spelled_out,
)
from service.api.tools.formats import TOOL_FORMATS
from service.api.tools.grammar import tools_grammar
from service.api.tools.parser import KnownTools, ToolCallParser
from tests.api.samples import fulfils, sample

PATCH = r"""
// A grammar of a patch, in the manner of coding agents.
start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: "*** Add File: " name LF added+   # a new file
    | "*** Update File: " name LF changed+ -> update
name: /[a-z]+\.\w{1,3}/
added: "+" /[^\n]{0,4}/ LF
changed: ("+" | "-" | " ") /(?:\\|"|\t|é|[a-c]){0,3}/ LF
%import common.LF
"""
PATCHED = re.compile(
    r"\*\*\* Begin Patch\n(\*\*\* (Add File: [a-z]+\.\w{1,3}\n(\+[^\n]{0,4}\n)+"
    r'|Update File: [a-z]+\.\w{1,3}\n([-+ ][\\"\té\w]{0,3}\n)+))+\*\*\* End Patch\n?'
)
CALC = """
start: sum
?sum: term (("+" | "-") term){0,2}
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
%ignore WS
%import common.WS
"""
FORMATS: dict[str, tuple[InputFormat | None, re.Pattern[str]]] = {
    "text": (None, re.compile(r"(?s).*")),
    "regex": (
        InputFormat(syntax="regex", definition=r'^(?P<q>"[^"]{0,3}"|/x\n){1,2}$'),
        re.compile(r'("[^"]{0,3}"|/x\n){1,2}'),
    ),
    "patch": (InputFormat(syntax="lark", definition=PATCH), PATCHED),
    "calc": (InputFormat(syntax="lark", definition=CALC), re.compile(r"[0-9()+\s-]+")),
}


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_an_input_matches_its_format(name: str, kind: str) -> None:
    form, pattern = FORMATS[kind]
    tool = FunctionDefinition(name="run", custom=True, input_format=form)
    use = ToolUse(functions=(tool,), may_call=(0,), forced=True, parallel=False)
    grammar = tools_grammar(use, TOOL_FORMATS[name], {})
    known = KnownTools(custom=frozenset({"run"}))
    ended = 0
    for seed in range(6):
        text = sample(grammar, random.Random(seed))
        if text is None:
            continue
        ended += 1
        parser = ToolCallParser(TOOL_FORMATS[name], request_id="r", tools=known)
        (call,) = parser.push(text).calls
        assert parser.called, text
        assert call.custom
        assert pattern.fullmatch(call.arguments), text
    assert ended, "no sample has ended"


PATTERNS = [
    "abc", r"a\nb", r"\s", r"[\s\d]{2}", ".", "a.c", r"[^a]", r'[^"\\]', r'["\\\/]+', r"\\", r"\/",
    r"(?:x|\")*", r"\w\W", r"\D", r"[\x00-\x1f]", r"\x22", r"\u0022", r"\p{L}.", r"\P{L}", r"[\]a]",
    r"[]a]", r"[^\]\n]",
]  # fmt: skip
TEXTS = [
    "", "a", "abc", "a\nb", "\n", "\t", " \n", "1 ", '"', "\\", "/", "\\\\", 'x"x', "é", "é.",
    "a😀", "\x00", "\x1f", "a\tc", "a\nc", "]", "x", "b", '\\"', " ",
]  # fmt: skip


@pytest.mark.parametrize("flags", ["", "s", "i", "is"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_escaped_pattern_matches_the_escaped_texts(pattern: str, flags: str) -> None:
    """Of every text: the pattern matches it if and only if the escaped one matches its JSON."""
    plain = lark_grammar(f"start: /{pattern}/{flags}" if flags else f"start: /{pattern}/")
    spelled = [spelled_out(pattern, flags, escaped=True)]
    if not flags:
        spelled.append(f"/{escaped_regex(pattern)}/")
    for expression in spelled:
        escaped = lark_grammar(f"start: {expression}")
        for text in TEXTS:
            content = json.dumps(text, ensure_ascii=False)[1:-1]
            assert fulfils(plain, text) == fulfils(escaped, content), (text, escaped)


@pytest.mark.parametrize("content", ["a", "\n", '"', "\\x", "\\u0041", "\x1f", "a\\"])
def test_what_is_no_json_never_matches(content: str) -> None:
    """The complement of a class has raw quotes, backslashes and control characters."""
    matched = fulfils(lark_grammar(f"start: /{escaped_regex('[^b]+')}/"), content)
    assert matched == (content == "a")


LINES = "start: line+\nline: LINE LF\nLINE: /.*/ | WORD_\nWORD_: /[^x]/i*\n%import common.LF"


OWN_BLANKS = r"""
start: X+
X: /[a-c]+[0-9]/
BLANKS: /[ \t]+/
%ignore BLANKS
%ignore ","
"""


@pytest.mark.parametrize("grammar", [PATCH, CALC, LINES, OWN_BLANKS])
def test_the_same_inputs_are_derived(grammar: str) -> None:
    whole, escaped = (
        lark_grammar(embedded_lark(grammar, escaped=escaped)) for escaped in (False, True)
    )
    ended = 0
    for seed in range(6):
        text = sample(whole, random.Random(seed))
        if text is not None:
            assert fulfils(escaped, json.dumps(text, ensure_ascii=False)[1:-1]), text
        content = sample(escaped, random.Random(seed))
        if content is not None:
            ended += 1
            assert fulfils(whole, json.loads(f'"{content}"')), content
    assert ended, "no sample has ended"


@pytest.mark.parametrize(
    "grammar",
    [
        "start: <|im_end|>", "start: <[5]>", 'start: %json {"type": "object"}',
        "start: %lark {\nstart: /a/\n}", "%llguidance {}\nstart: /a/", "start: /^a$/",
        r"start: /\bword\b/", "start: /[a&&[b]]/", "start: /[[:alpha:]]/", "start: /(?i)a/",
        'start: "\\x41"', 'start: "a\\n"i', "start: /a/x", r"start: /\p{Cc}/", r"start: /\u{41}/",
        "start: /[a--b]/", "%declare X\nstart: X",
        "start: X\nX: /a/ & /b/", "start: X\nX: ~/a/", "start: /(a/", "start: /a)/", "start: /[a/",
        'start: X "b"\nX: /[^a]/\n%ignore " "', 'start: "a"\n%ignore /ab/',
    ],
)  # fmt: skip
def test_what_cannot_be_escaped_is_rejected(grammar: str) -> None:
    with pytest.raises(UnsupportedGrammarError):
        embedded_lark(grammar, escaped=True)


LONG = [
    "start: /" + "." * 30_000 + "/", "start: /" + "[" * 30_000 + "/", 'start: "' + '\\"' * 15_000,
    "start: /" + "\\/" * 15_000, "x" * 100_000, "start: a\n" + '%ignore " "\n' * 3_000,
    "start: /" + "(" * 30_000 + "/", "start: " + "/a/" * 15_000,
]  # fmt: skip


@pytest.mark.parametrize("grammar", LONG, ids=range(len(LONG)))
def test_a_long_grammar_takes_little_work(grammar: str) -> None:
    """Grammars come from clients, and are read on the event loop: a quadratic step would take
    minutes.
    """
    with pytest.raises(UnsupportedGrammarError):
        embedded_lark(grammar, escaped=True)


def test_a_pattern_is_matched_as_a_whole() -> None:
    escaped = escaped_regex("a|b")
    assert fulfils(lark_grammar(f"start: /{escaped}/"), "a")
    assert fulfils(regex_grammar("a|b"), "b")
