r"""Sentiment of movie reviews: a tuned classifier against VADER's lexicon, on the same sentences.

The sentences and their human scores come with the source package of vaderSentiment (MIT):

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    tar xzf vaderSentiment-3.3.2.tar.gz
    python -m loadtest.sentiment vaderSentiment-3.3.2 --write reviews.csv
    quire tune classify --model all-minilm-l6-v2 --data reviews.csv --text text --label label \
        --learning-rate 1e-4 --context 64 --out my-sentiment
    python -m loadtest.sentiment vaderSentiment-3.3.2 --model my-sentiment
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import tarfile
from pathlib import Path
from typing import Protocol

from model.runners.encoding import load_encoder
from model.training.data import hold_out

ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def sentences(source: Path) -> list[tuple[str, str]]:
    """Texts and labels: the sign of the mean score of 20 raters; without the few that have 0."""
    with tarfile.open(source / ARCHIVE) as archive:
        member = archive.extractfile(MEMBER)
        if member is None:
            raise SystemExit(f"{ARCHIVE} has no {MEMBER}")
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    rows = (line.split("\t", 2) for line in lines if line.strip())
    return [
        (text, "positive" if float(score) > 0 else "negative")
        for _, score, text in rows
        if float(score) != 0
    ]


class Lexicon(Protocol):
    """VADER's analyser."""

    def polarity_scores(self, text: str) -> dict[str, float]: ...


def lexicon(source: Path) -> Lexicon:
    """The analyser of the package itself."""
    file = source / "vaderSentiment" / "vaderSentiment.py"
    spec = importlib.util.spec_from_file_location("vader", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"no VADER in {source}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyser: Lexicon = module.SentimentIntensityAnalyzer()
    return analyser


def accuracies(source: Path, model: Path, *, share: float, seed: int) -> dict[str, float]:
    """Of the rows that training held out. A lexicon's 0 counts as what suits it better."""
    rows = sentences(source)
    _, held = hold_out([label for _, label in rows], share=share, seed=seed)
    chosen = [rows[index] for index in held]
    runner, tokenizer = load_encoder(model)
    encodings = tokenizer.encode_batch([text for text, _ in chosen], truncate_to=256)
    vectors = runner.encode(encodings)
    tuned = [runner.info.labels[int(vector.argmax())] for vector in vectors]
    analyser = lexicon(source)
    scores = [analyser.polarity_scores(text)["compound"] for text, _ in chosen]

    def right(given: list[str]) -> float:
        hits = sum(one == label for one, (_, label) in zip(given, chosen, strict=True))
        return hits / len(chosen)

    by_tie = [
        right(["positive" if score > 0 or (score == 0 and tie) else "negative" for score in scores])
        for tie in (True, False)
    ]
    return {"sentences": len(chosen), "tuned": right(tuned), "VADER": max(by_tie)}


def main() -> None:
    """Writes the sentences, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the unpacked source package")
    parser.add_argument("--write", type=Path, help="CSV file to write")
    parser.add_argument("--model", type=Path, help="folder of the tuned classifier")
    parser.add_argument("--holdout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.write is not None:
        with options.write.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([("text", "label"), *sentences(options.source)])
    if options.model is not None:
        found = accuracies(options.source, options.model, share=options.holdout, seed=options.seed)
        for name, value in found.items():
            print(f"| {name} | {value:.4g} |")


if __name__ == "__main__":
    main()
