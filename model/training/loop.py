"""The training loop: AdamW, warm-up and cosine, clipping, accumulation; stops and resumes.

The state after a step (weights, moments, number of the step) is all that the next one depends on:
the data's order and the learning rate are functions of the step. So a resumed run computes, on a
CPU with the same number of threads, the bits of one that was not interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model.training import TrainingError
from model.training.data import TokenBatch
from model.training.ranks import Ranks
from model.transformer import Transformer

STATE = "training.state"  # in the output folder until training is finished
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained. Raises TrainingError for values out of range."""

    steps: int
    batch: int = 16  # texts per forward pass and process
    accumulate: int = 1  # passes per step
    learning_rate: float = 1e-4  # the highest, after the warm-up
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.01  # of matrices
    clip: float = 1.0  # norm of the gradient
    seed: int = 0
    evaluate_every: int = 100  # steps
    save_every: int = 500  # steps; a stop saves, too
    patience: int = 0  # evaluations without progress that end training; 0: none do

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "evaluate_every", "save_every"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise TrainingError(f"{name} must be a whole number of at least 1")
        if not 0 < self.learning_rate <= 1:
            raise TrainingError("learning_rate must be above 0 and at most 1")
        if not 0 <= self.warmup <= 1:
            raise TrainingError("warmup must be from 0 to 1")
        if not (0 <= self.weight_decay <= 1 and self.clip > 0):
            raise TrainingError("weight_decay must be from 0 to 1 and clip above 0")

    def rate(self, step: int) -> float:
        """The learning rate of a step: it rises in a line, then falls as a cosine to a tenth."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class Task(Protocol):
    """What is learned: examples, a loss, and a measure of how well it is done."""

    @property
    def name(self) -> str:
        """Stated in the saved state: a run is resumed with the same model, data and options."""
        ...

    def batches(self, first: int) -> Iterator[TokenBatch]:
        """Batch number `first` of the training examples and all later ones, without an end."""
        ...

    def loss(self, network: Transformer, batch: TokenBatch) -> torch.Tensor:
        """The sum of the losses of a batch."""
        ...

    def evaluate(self, network: Transformer) -> Mapping[str, float]:
        """Measures on held-out examples, `loss` among them; empty if none are held out."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did."""

    step: int  # from 1
    loss: float  # per term, over the step's batch
    rate: float
    num_tokens: int  # of all processes
    measures: Mapping[str, float]  # empty if the step was not followed by an evaluation


class Training:
    """A network in training. Its trainable parameters are those that require gradients."""

    def __init__(
        self,
        network: Transformer,
        task: Task,
        recipe: Recipe,
        *,
        ranks: Ranks,
        autocast: bool = False,
    ) -> None:
        self.step = 0
        self.finished = False
        self._network = network.to(ranks.device)
        self._task, self._recipe, self._ranks, self._autocast = task, recipe, ranks, autocast
        self._trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        ranks.copy(network.state_dict().values())
        # On a CPU the fused update reads each weight once: a seventh of the time of the loop.
        fused = True if ranks.device.type == "cpu" else None
        groups = _groups(self._trained, recipe)
        self._optimizer = torch.optim.AdamW(groups, betas=_BETAS, fused=fused)
        self._best: dict[str, torch.Tensor] = {}
        self._best_loss = math.inf
        self._without_progress = 0

    def run(
        self, folder: Path, *, report: Callable[[StepReport], None], stop: Callable[[], bool]
    ) -> bool:
        """Trains to the end, or until `stop`, which is asked between steps: then the state is saved
        in the folder. Returns whether training is finished.
        """
        recipe, ranks = self._recipe, self._ranks
        per_step = recipe.accumulate * ranks.size
        batches = self._task.batches(self.step * per_step)
        while not self.finished:
            if ranks.any(stop()):
                self.save(folder)
                return False
            whole_step = [next(batches) for _ in range(per_step)]
            loss, rate = self._take_step(whole_step)
            self.step += 1
            ends = self.step == recipe.steps
            measures: Mapping[str, float] = {}
            if ends or self.step % recipe.evaluate_every == 0:
                measures = self._evaluate()
            exhausted = 0 < recipe.patience <= self._without_progress
            self.finished = ends or (bool(measures) and ranks.any(exhausted))
            tokens = sum(batch.num_tokens for batch in whole_step)
            report(
                StepReport(
                    step=self.step, loss=loss, rate=rate, num_tokens=tokens, measures=measures
                )
            )
            if not self.finished and self.step % recipe.save_every == 0:
                self.save(folder)
        if recipe.patience and self._best:
            self._load(self._best)
        return True

    def _take_step(self, batches: list[TokenBatch]) -> tuple[float, float]:
        """One update. Returns the loss per term over all processes, and the learning rate."""
        ranks, recipe = self._ranks, self._recipe
        own = batches[ranks.index :: ranks.size]
        terms = max(1, sum(batch.count for batch in batches))
        total = torch.zeros((), device=ranks.device)
        for batch in own:
            with self._precision():
                loss = self._task.loss(self._network, batch.to(ranks.device))
            torch.autograd.backward(loss / terms)
            total += loss.detach()
        self._sum_gradients()
        rate = recipe.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(list(self._trained.values()), recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        mean = float(ranks.sum(total)) / terms
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss of step {self.step + 1} is not finite: lower --learning-rate"
            )
        return mean, rate

    def _sum_gradients(self) -> None:
        """Over the processes. One that a process did not compute counts as zero."""
        if self._ranks.size == 1:
            return
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.sum_all(p.grad for p in self._trained.values() if p.grad is not None)

    def _evaluate(self) -> Mapping[str, float]:
        with torch.no_grad(), self._precision():
            measures = self._task.evaluate(self._network)
        if "loss" in measures and self._recipe.patience:
            if measures["loss"] < self._best_loss:
                self._best_loss, self._without_progress = measures["loss"], 0
                self._best = {n: p.detach().clone() for n, p in self._trained.items()}
            else:
                self._without_progress += 1
        return measures

    def _precision(self) -> AbstractContextManager[object]:
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self._ranks.device.type, torch.bfloat16)

    def save(self, folder: Path) -> None:
        """Writes the state, whole or not at all. Only the leading process does."""
        if not self._ranks.leads:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, parameter in self._trained.items():
            tensors[f"weights.{name}"] = parameter.detach()
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"{kind}.{name}": tensor for kind, tensor in moments.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        about = {
            "step": self.step,
            "best_loss": None if math.isinf(self._best_loss) else self._best_loss,
            "without_progress": self._without_progress,
            "run": self._identity(),
        }
        part = folder / f"{STATE}.part"
        host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(host, part, metadata={"about": json.dumps(about)})
        part.replace(folder / STATE)

    def resume(self, folder: Path) -> None:
        """Continues from the state in a folder. Raises TrainingError if it is of another run."""
        try:
            with safe_open(folder / STATE, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            raise TrainingError(f"{folder.name} has no saved state to resume from") from None
        changed = _difference(about["run"], self._identity())
        if changed:
            raise TrainingError(f"a run is resumed as it was started, but {changed}")
        kinds: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(".")
            kinds.setdefault(kind, {})[parameter] = tensor.to(self._ranks.device)
        self._load(kinds.pop("weights"))
        self._best = kinds.pop("best", {})
        for kind, of_parameter in kinds.items():
            for name, tensor in of_parameter.items():
                moment = tensor.cpu() if kind == "step" else tensor
                self._optimizer.state[self._trained[name]][kind] = moment
        self.step = about["step"]
        self._best_loss = math.inf if about["best_loss"] is None else about["best_loss"]
        self._without_progress = about["without_progress"]

    def _load(self, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(weights[name])

    def _identity(self) -> dict[str, object]:
        return {"task": self._task.name, "processes": self._ranks.size, **asdict(self._recipe)}


def _difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What differs between two runs, in words; empty if nothing does."""
    for name, value in now.items():
        if before.get(name) != value:
            shown = name.replace("_", " ")
            return f"its {shown} was {before.get(name)} and is now {value}"
    return ""


def _groups(trained: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict[str, object]]:
    """Matrices decay; vectors (norms and biases) do not."""
    decay = {2: recipe.weight_decay, 1: 0.0}
    return [
        {
            "params": [p for p in trained.values() if min(p.dim(), 2) == dims],
            "lr": recipe.learning_rate,
            "weight_decay": amount,
        }
        for dims, amount in decay.items()
        if any(min(p.dim(), 2) == dims for p in trained.values())
    ]
