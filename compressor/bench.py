"""What a stage works with: the data, the original network, its scores, the budgets, and a place to say things."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from compressor import compute
from compressor.budgets import Budget, margins
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.progress import Reporter
from compressor.workload import Batch, Split, Workload
from profiles.settings import did_you_mean


@dataclass
class Bench:
    """Everything around a model while it is compressed.

    Attributes:
        original: the network as it was brought; the teacher of every distillation. Never changed.
        budgets: for the tasks that have one.
        multiple: layer widths are rounded to multiples of this (the device's vector width).
        before: the original's scores on the validate split, once it has been scored.
        directory: where a stage may leave files that belong to its result.
        checkpoints: where trainings leave their state while a stage is not finished; None keeps none.
        notes: sentences a stage leaves for the report.
        asked: for each search that put questions to cut networks, how many and about how many groups of channels.
        speed: a model's latency on the device as a share of the original's; None where nobody can measure it.
        short: whether the stage ended short of the goal it was given.
        device: where trainings and scores are computed; models are on the CPU in between.
    """

    workload: Workload
    original: MultiTaskModel
    budgets: Mapping[str, Budget]
    multiple: int
    seed: int
    progress: Reporter
    before: Mapping[str, float] = field(default_factory=dict)
    directory: Path = Path()
    checkpoints: Path | None = None
    notes: list[str] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)
    short: bool = False
    speed: Callable[[MultiTaskModel], float] | None = None
    device: torch.device = compute.CPU

    @cached_property
    def validation(self) -> list[Batch]:
        return list(self.workload.batches("validate", self.seed))

    def scores(self, model: MultiTaskModel, batches: list[Batch] | None = None) -> dict[str, float]:
        """The metric of each task that has labels in the validate split, over all of it, or in the given batches.

        Of several processes the first scores, and tells the others.

        Raises:
            CompressError: an answer or a score is not finite, an answer does not fit its metric, or a task with a
                budget has no label.
        """
        model.module.eval()
        return compute.by_first(lambda: self._scores(model, batches))

    def _scores(self, model: MultiTaskModel, batches: list[Batch] | None) -> dict[str, float]:
        split = "the validate split" if batches is None else "the batches to judge by"
        metrics = {name: _alone(metric).to(self.device) for name, metric in self.workload.metrics().items()}
        seen: set[str] = set()
        with torch.no_grad(), compute.at(self.device, model.module):
            for given in (self.validation if batches is None else batches) if metrics else ():
                batch = given.to(self.device)
                answers = model.answers(*batch.inputs)
                for task in [name for name in batch.labels if name in metrics]:
                    if task not in answers:
                        raise CompressError(
                            f"A label of {split} is for no task: '{task}'.{did_you_mean(task, answers)}"
                        )
                    if not answers[task].isfinite().all():
                        raise CompressError(f"Task '{task}' answers NaN or infinity on {split}.")
                    try:
                        metrics[task].update(answers[task].contiguous(), batch.labels[task])  # some metrics view it
                    except (RuntimeError, ValueError, IndexError, TypeError) as error:
                        shape = tuple(answers[task].shape)
                        raise CompressError(
                            f"Task '{task}' answers with shape {shape}; its metric cannot take that: {error}"
                        ) from error
                    seen.add(task)
        if lacking := [name for name in self.budgets if name not in seen]:
            raise CompressError(f"Task '{lacking[0]}' has a budget, but no label in {split} to hold it to.")
        found = {task.name: float(metrics[task.name].compute()) for task in model.tasks if task.name in seen}
        if wrong := [f"'{task}' is {score}" for task, score in found.items() if not isfinite(score)]:
            raise CompressError(f"The score of task {', '.join(wrong)}: are there NaN among its labels?")
        return found

    def margins(self, scores: Mapping[str, float], slack: float = 1.0) -> dict[str, float]:
        return margins(self.original.tasks, self.budgets, self.before, scores, slack)

    def over(self, scores: Mapping[str, float], slack: float) -> str:
        """Which task is furthest outside its budget and by how much, as a clause; empty when all are inside."""
        left, worst = self.margins(scores, slack), self.worst(scores)
        if not worst or left[worst] >= 0:
            return ""
        times = f" (times {slack:g})" if slack != 1 else ""
        return f"task '{worst}' would leave its budget{times} by {-left[worst]:.4g}"

    def shares(self, scores: Mapping[str, float]) -> dict[str, float]:
        """What is left of each budget as a share of it: 1 where nothing was lost, negative where it is overspent."""
        left = self.margins(scores)
        allowed = {name: self.budgets[name].allowed(self.before[name]) for name in left}
        return {name: left[name] / max(allowed[name], 1e-12) if left[name] or allowed[name] else 1.0 for name in left}

    def worst(self, scores: Mapping[str, float]) -> str:
        """The task that has the least share of its budget left; empty without budgets."""
        left = self.shares(scores)
        return min(left, key=lambda name: left[name], default="")

    def calibration(self, count: int) -> list[Batch]:
        """The first batches of the calibrate split, at least one."""
        found = list(islice(self.workload.batches("calibrate", self.seed), count))
        if not found:
            raise CompressError("The workload has no batch in its calibrate split, which this stage reads.")
        return found

    def fall_short(self, text: str) -> None:
        """Say that the stage did not reach its goal, and why."""
        self.short = True
        self.note(text)

    def note(self, text: str) -> None:
        """Leave a sentence for the report, once, however often it is said."""
        if text not in self.notes:
            self.notes.append(text)
            self.progress.line(f"  {text}")


def _alone(metric: Metric) -> Metric:
    """A metric that does not look for other processes to share its counts with."""
    for part in metric.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = lambda: False
    return metric


def rehearse(bench: Bench, splits: tuple[Split, ...]) -> None:
    """Take one batch of each split through the network and its losses, so that a fault shows before hours of work.

    Raises:
        CompressError: what is wrong with the batch, or with what the workload makes of it.
    """
    names = [task.name for task in bench.original.tasks]
    for split in splits:
        batch = next(iter(bench.workload.batches(split, bench.seed)), None)
        if batch is None:
            raise CompressError(f"The workload has no batch in its {split} split, which the stages read.")
        if not isinstance(batch, Batch):
            raise CompressError(f"The workload's {split} split yields a {type(batch).__name__}, not a workload.Batch.")
        if unknown := [name for name in batch.labels if name not in names]:
            raise CompressError(
                f"A label of the {split} split is for no task: '{unknown[0]}'.{did_you_mean(unknown[0], names)}"
            )
        try:
            with compute.at(bench.device, bench.original.module):
                batch = batch.to(bench.device)
                answers = bench.original.answers(*batch.inputs)
                losses = dict(bench.workload.losses(answers, batch)) if batch.labels else {}
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise CompressError(
                f"The first batch of the {split} split fails: {type(error).__name__}: {error}"
            ) from error
        for name, loss in losses.items():
            if name not in names:
                raise CompressError(f"losses() names no task: '{name}'.{did_you_mean(name, names)}")
            if loss.dim() != 0 or not loss.isfinite():
                raise CompressError(
                    f"The loss of task '{name}' on the {split} split should be one finite number, "
                    f"not {loss.tolist() if loss.numel() == 1 else tuple(loss.shape)}."
                )


def running_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    found = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in found if norm.track_running_stats]


@contextmanager
def by_batch(module: nn.Module) -> Iterator[None]:
    """Every batch norm takes the statistics of each batch, in evaluation too."""
    norms = running_norms(module)
    kept = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, var) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, var


def takes_batches(module: nn.Module, batches: list[Batch], device: torch.device = compute.CPU) -> bool:
    """Whether all batches are large enough for their own statistics: more than one value for each channel."""
    module.eval()
    shapes = {tuple(x.shape for x in batch.inputs): batch for batch in batches}
    with torch.no_grad(), compute.at(device, module), by_batch(module):
        return not any(_run(module, batch.to(device)) for batch in shapes.values())


def statistics(module: nn.Module) -> list[Tensor]:
    """Batch norm's running means and variances."""
    return [buffer for norm in running_norms(module) for buffer in norm.buffers() if buffer.is_floating_point()]


def _run(module: nn.Module, batch: Batch) -> str:
    """Run a module whose batch norms are training; why it refuses a batch that is too small for them, else nothing."""
    try:
        module(*batch.inputs)
    except ValueError as error:
        if "more than 1 value" not in str(error):
            raise
        return str(error)
    return ""


def reestimate_batchnorm(module: nn.Module, batches: list[Batch], device: torch.device = compute.CPU) -> None:
    """Replace the running statistics of every batch norm by plain averages over the given batches.

    Raises:
        CompressError: no batch has more than one value a channel for every batch norm.
    """
    norms = running_norms(module)
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad(), compute.at(device, module):
        faults = [fault for batch in batches if norms and (fault := _run(module, batch.to(device)))]
        if faults and len(faults) == len(batches):
            raise CompressError(f"Batch norm cannot be estimated on the calibrate split: {faults[0]}")
        compute.average([], statistics(module))  # which are alike but for the order of a GPU's sums
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
