"""What a stage works with: the data, the original network, its scores, the budgets, and a place to say things."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from compressor.budgets import Budget, margins
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.progress import Reporter
from compressor.workload import Batch, Workload


@dataclass
class Bench:
    """Everything around a model while it is compressed.

    Attributes:
        original: the network as it was brought; the teacher of every distillation. Never changed.
        budgets: for the tasks that have one.
        multiple: layer widths are rounded to multiples of this (the device's vector width).
        directory: where a stage may leave files that belong to its result.
        notes: sentences a stage leaves for the report.
    """

    workload: Workload
    original: MultiTaskModel
    budgets: Mapping[str, Budget]
    multiple: int
    seed: int
    progress: Reporter
    directory: Path
    notes: list[str] = field(default_factory=list)

    @cached_property
    def validation(self) -> list[Batch]:
        return list(self.workload.batches("validate", self.seed))

    @cached_property
    def before(self) -> dict[str, float]:
        """The original's scores on the validate split."""
        return self.scores(self.original)

    def scores(self, model: MultiTaskModel) -> dict[str, float]:
        """Each scorable task's metric over the whole validate split.

        Raises:
            CompressError: an answer or a score is not finite, or an answer does not fit its metric.
        """
        metrics = dict(self.workload.metrics())
        if not metrics:
            return {}
        model.module.eval()
        with torch.no_grad():
            for batch in self.validation:
                answers = model.answers(*batch.inputs)
                for task in batch.labels.keys() & metrics.keys():
                    if not answers[task].isfinite().all():
                        raise CompressError(f"Task '{task}' answers NaN or infinity on the validate split.")
                    try:
                        metrics[task].update(answers[task], batch.labels[task])
                    except (RuntimeError, ValueError, IndexError) as error:
                        shape = tuple(answers[task].shape)
                        raise CompressError(
                            f"Task '{task}' answers with shape {shape}; its metric cannot take that: {error}"
                        ) from error
        return {name: float(metric.compute()) for name, metric in metrics.items()}

    def margins(self, scores: Mapping[str, float], slack: float = 1.0) -> dict[str, float]:
        return margins(self.original.tasks, self.budgets, self.before, scores, slack)

    def calibration(self, count: int) -> list[Batch]:
        return list(islice(self.workload.batches("calibrate", self.seed), count))

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.line(f"  {text}")


def reestimate_batchnorm(module: nn.Module, batches: list[Batch]) -> None:
    """Replace the running statistics of every batch norm by plain averages over the given batches."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not batches:
        return
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for batch in batches:
            module(*batch.inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
