"""All that a user writes: a `Workload` names the tasks, builds the network, and brings batches, losses and metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Split = Literal["train", "calibrate", "validate"]


@dataclass(frozen=True, slots=True)
class Task:
    """One question the network answers.

    Attributes:
        name: used in recipes, reports and as the name of the artifact's output.
        output: key of the dict, or index of the tuple, that the network's forward returns; 0 for a single tensor.
        channels: half-open range along dimension 1 of that output that is this task's answer, when several
            tasks share one output tensor (a fused layer); None for all of it.
        metric: name of the figure `Workload.metrics()[name]` computes, for people.
        higher_is_better: direction of that figure.
    """

    name: str
    output: str | int = 0
    channels: tuple[int, int] | None = None
    metric: str = ""
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs in the order forward takes them, batch first; labels by task name, for some tasks only if need be."""

    inputs: tuple[Tensor, ...]
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        labels = {name: label.to(device) for name, label in self.labels.items()}
        return Batch(tuple(tensor.to(device) for tensor in self.inputs), labels)


@runtime_checkable
class Workload(Protocol):
    """A trained multi-task network with its data.

    `outputs` in `losses` is keyed by task name and already cut to each task's channels. `losses` returns one scalar
    (mean over the batch) for each task that has labels in the batch. `metrics` returns a fresh torchmetrics.Metric
    for each task that can be scored, updated with `metric.update(outputs[task], batch.labels[task])`.
    `batches` yields the same batches for the same (split, seed); "train" is one epoch, shuffled by the seed.
    `normalisation` says in words what a caller must do to raw data before the first layer; it goes into the manifest.
    """

    tasks: tuple[Task, ...]
    normalisation: str

    def build(self) -> nn.Module: ...
    def example_inputs(self) -> tuple[Tensor, ...]: ...
    def batches(self, split: Split, seed: int) -> Iterable[Batch]: ...
    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]: ...
    def metrics(self) -> Mapping[str, Metric]: ...
