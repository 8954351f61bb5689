"""`quire tune pretrain | generate | classify | seq2seq`: training with progress.

Under `torchrun`, the first process reports and writes. Nothing heavy is imported before a command
runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from service.errors import StartupError
from service.settings import load_settings
from service.startup import fetch_model, set_thread_waiting
from service.training_run import TrainingRun

if TYPE_CHECKING:
    from model.training.ranks import Ranks

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
Problem = Literal["single", "multi", "regression"]


tune = typer.Typer(help="Train a model: a new one, or one that exists.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Model to start from, as for `quire serve`.")]
Out = Annotated[Path, typer.Option(help="Folder to write; new or empty.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run saved in --out.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, cuda:1, or auto.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")]
Bfloat16 = Annotated[
    bool | None,
    typer.Option(help="Compute products in bfloat16; default: on a GPU."),
]
Epochs = Annotated[float, typer.Option(min=0.001, help="Passes over the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per pass and process.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Passes per update.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Warmup = Annotated[float, typer.Option(min=0, max=1, help="Share of the steps that warm up.")]
Decay = Annotated[float, typer.Option(min=0, max=1, help="Weight decay of matrices.")]
Holdout = Annotated[float, typer.Option(min=0, max=0.9, help="Share of rows to validate with.")]
Context = Annotated[int, typer.Option(min=2, help="Maximum tokens per text.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights and order.")]


@tune.command()
def pretrain(
    *,
    data: Annotated[str, typer.Option(help="Text file, folder, or pattern of files.")],
    out: Out,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of sizes and steps; default: a tiny decoder.")
    ] = None,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = None,
    bfloat16: Bfloat16 = None,
) -> None:
    """Train a new decoder and its vocabulary from plain text."""
    with _errors(), _ranks(device, threads) as ranks:
        from model.training.folder import check_output
        from model.training.network import initialised
        from model.training.pretrain import (
            Corpus,
            model_config,
            read_documents,
            read_plan,
            train_vocabulary,
            write_pretrained,
        )

        plan = read_plan(config)
        check_output(out, resume=resume)
        documents = read_documents(data)
        tokenizer = train_vocabulary(documents, plan.vocab_size)
        plan = replace(plan, vocab_size=tokenizer.get_vocab_size())
        corpus = Corpus(documents, tokenizer, plan)
        network = initialised(model_config(plan), seed=plan.recipe.seed)
        run = TrainingRun(out, ranks, bfloat16=bfloat16, resume=resume)
        run.train(network, corpus, plan.recipe)
        if ranks.leads:
            write_pretrained(out, network, tokenizer, plan)
            run.finish(per_byte=corpus.tokens_per_byte)


@tune.command()
def generate(
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="CSV, JSONL or Parquet rows with messages, or with prompt and completion."
        ),
    ],
    out: Out,
    model: Model = "smollm2-135m-instruct",
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Rank of low-rank adapters; 0 trains all weights.")
    ] = 0,
    lora_alpha: Annotated[float, typer.Option(help="Scale of adapters, times their rank.")] = 16.0,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Matrices to adapt, such as q_proj,v_proj; default: attention's."),
    ] = None,
    anchors: Annotated[
        bool,
        typer.Option("--anchors", help="Train for `--kv-compression anchors`, under its mask."),
    ] = False,
    epochs: Epochs = 1.0,
    batch: BatchSize = 8,
    accumulate: Accumulate = 1,
    learning_rate: Rate = 1e-4,
    warmup: Warmup = 0.05,
    weight_decay: Decay = 0.01,
    holdout: Holdout = 0.05,
    context: Context = 1024,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = None,
    bfloat16: Bfloat16 = None,
) -> None:
    """Fine-tune a decoder on chats or completions; the loss is of the answers alone."""
    with _errors(), _ranks(device, threads) as ranks:
        from model.training.data import hold_out
        from model.training.folder import check_output
        from model.training.generate import (
            Answers,
            anchor_rule,
            open_decoder,
            read_examples,
            write_tuned,
        )
        from model.training.loop import Recipe
        from model.training.lowrank import TARGETS, LowRank, add_adapters
        from model.training.network import build_network

        check_output(out, resume=resume)
        targets = TARGETS if lora_targets is None else tuple(lora_targets.split(","))
        lowrank = None
        if lora_rank:
            lowrank = LowRank(rank=lora_rank, alpha=lora_alpha, targets=targets)
        base = open_decoder(_find(model))
        length = min(context, base.config.max_model_len)
        examples = read_examples(data, base.tokenizer, context=length)
        rest, held = hold_out([0] * len(examples), share=holdout, seed=seed)
        recipe = Recipe(
            steps=_steps(len(rest), epochs, batch * accumulate * ranks.size),
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            seed=seed,
        )
        network = build_network(base.config, base.weights)
        if lowrank is not None:
            add_adapters(network, base, lowrank, seed=seed)
        train, valid = ([examples[index] for index in part] for part in (rest, held))
        task = Answers(
            train,
            valid,
            recipe,
            name=f"{base.digest[:12]}-{lowrank}",
            anchor_ids=anchor_rule(base) if anchors else frozenset(),
        )
        run = TrainingRun(out, ranks, bfloat16=bfloat16, resume=resume)
        run.train(network, task, recipe)
        if ranks.leads:
            write_tuned(out, network, base, lowrank, name=model)
            run.finish()


@tune.command()
def classify(
    *,
    data: Annotated[Path, typer.Option(help="CSV, JSONL or Parquet rows.")],
    text: Annotated[str, typer.Option(help="Column of the texts.")],
    label: Annotated[
        str,
        typer.Option(help="Column of the labels; several as a list, or as a|b in a CSV file."),
    ],
    out: Out,
    model: Model = "smollm2-135m-instruct",
    problem: Annotated[
        Problem | None, typer.Option(help="What a label is; default: as the column looks.")
    ] = None,
    epochs: Epochs = 3.0,
    batch: BatchSize = 16,
    accumulate: Accumulate = 1,
    learning_rate: Rate = 5e-5,
    warmup: Warmup = 0.1,
    weight_decay: Decay = 0.01,
    holdout: Holdout = 0.1,
    patience: Annotated[
        int, typer.Option(min=0, help="Evaluations without a lower loss that end training.")
    ] = 3,
    context: Context = 256,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = None,
    bfloat16: Bfloat16 = None,
) -> None:
    """Train a classifier of texts on an encoder or a decoder; the best evaluation counts."""
    with _errors(), _ranks(device, threads) as ranks:
        from model.config import Problem as Kind
        from model.training import classify as task_of
        from model.training.data import hold_out
        from model.training.folder import check_output, open_base
        from model.training.loop import Recipe

        check_output(out, resume=resume)
        kind = None if problem is None else Kind(PROBLEMS[problem])
        labelled = task_of.read_labelled(data, text=text, label=label, problem=kind)
        base = open_base(_find(model), headless=True)
        length = min(context, base.config.max_model_len)
        texts = task_of.read_tokens(base, labelled.texts, context=length)
        rest, held = hold_out(labelled.groups(), share=holdout, seed=seed)
        steps = _steps(len(rest), epochs, batch * accumulate * ranks.size)
        recipe = Recipe(
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            seed=seed,
            evaluate_every=max(1, math.ceil(steps / (2 * epochs))),
            patience=patience if held else 0,
        )
        fields = task_of.classifier_fields(base, labelled)
        network = task_of.with_head(base, fields, seed=seed)
        task = task_of.Classification(
            texts, labelled, train=rest, held=held, recipe=recipe, name=base.digest[:12]
        )
        run = TrainingRun(out, ranks, bfloat16=bfloat16, resume=resume)
        run.train(network, task, recipe)
        if ranks.leads:
            task_of.write_classifier(out, network, base, fields)
            counts: list[list[int]] = []
            if held:
                run.measures, counts = task.judge(network)
            run.finish()
            run.show_confusion(counts, labelled.labels)


@tune.command()
def seq2seq(
    *,
    data: Annotated[Path, typer.Option(help="CSV, JSONL or Parquet rows of pairs.")],
    out: Out,
    source: Annotated[str, typer.Option(help="Column of the sources.")] = "source",
    target: Annotated[str, typer.Option(help="Column of the targets.")] = "target",
    vocab_size: Annotated[int, typer.Option(min=257, max=65536, help="Tokens.")] = 512,
    hidden_size: Annotated[int, typer.Option(min=32, help="Numbers per token.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of each, encoder and decoder.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 4000,
    batch: BatchSize = 64,
    accumulate: Accumulate = 1,
    learning_rate: Rate = 2e-3,
    warmup: Warmup = 0.05,
    weight_decay: Decay = 0.01,
    holdout: Holdout = 0.01,
    context: Context = 128,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "auto",
    threads: Threads = None,
    bfloat16: Bfloat16 = None,
) -> None:
    """Train a new encoder-decoder and its vocabulary from pairs, such as translations."""
    with _errors(), _ranks(device, threads) as ranks:
        from model.training import seq2seq as task_of
        from model.training.folder import check_output
        from model.training.loop import Recipe
        from model.training.network import initialised

        check_output(out, resume=resume)
        pairs = task_of.read_pairs(data, source=source, target=target)
        tokenizer = task_of.new_vocabulary(pairs, vocab_size)
        fields = task_of.config_json(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=hidden_size,
            layers=layers,
            context=context,
        )
        config = task_of.model_config(fields)
        examples = task_of.tokenised(pairs, tokenizer, context=context)
        rest, held = task_of.hold_out_sources(pairs, share=holdout, seed=seed)
        recipe = Recipe(
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            seed=seed,
            evaluate_every=max(1, steps // 10),
        )
        train, valid = ([examples[index] for index in part] for part in (rest, held))
        task = task_of.Translation(train, valid, recipe)
        network = initialised(config, seed=seed)
        run = TrainingRun(out, ranks, bfloat16=bfloat16, resume=resume)
        run.train(network, task, recipe)
        if ranks.leads:
            task_of.write_translator(out, network, tokenizer, fields)
            run.finish()


@contextmanager
def _errors() -> Iterator[None]:
    """Converts the errors of models, data and options to StartupError."""
    from model.checkpoint import CheckpointError
    from model.checkpoint.fetch import FetchError
    from model.training import TrainingError

    try:
        yield
    except (CheckpointError, FetchError, TrainingError) as error:
        raise StartupError(f"tune: {error}") from None
    except OSError as error:
        raise StartupError(f"tune: {error.strerror or error}: {error.filename or ''}") from None


@contextmanager
def _ranks(device: str, threads: int | None) -> Iterator[Ranks]:
    """The place of this process while it trains."""
    set_thread_waiting()
    import torch

    from model.training.ranks import join_ranks

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        ranks = join_ranks(device)
    except ValueError as error:
        raise StartupError(f"tune: {error}") from None
    try:
        yield ranks
    finally:
        ranks.close()


def _find(model: str) -> Path:
    """The files of a model, fetched if they are not there."""
    settings = load_settings({"model": model})
    return fetch_model(settings, settings.sources[0], console=Console(stderr=True))


def _steps(rows: int, epochs: float, per_step: int) -> int:
    return max(1, math.ceil(rows * epochs / per_step))
