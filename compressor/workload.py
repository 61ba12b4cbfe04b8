"""All that a user writes: a `Workload` names the tasks, builds the network, and brings batches, losses and metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from compressor.errors import CompressError
from profiles.settings import did_you_mean

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


def answers(raw: object, tasks: Iterable[Task]) -> dict[str, Tensor]:
    """Cut what forward returned into one tensor for each task.

    Raises:
        CompressError: an output is missing, is not a tensor, or has fewer channels than a task says.
    """
    found = {}
    for task in tasks:
        output = _pick(raw, task)
        if task.channels is not None:
            first, last = task.channels
            if output.dim() < 2 or not 0 <= first < last <= output.shape[1]:
                raise CompressError(
                    f"Task '{task.name}' is channels {first}:{last} of output {task.output!r}, "
                    f"whose shape is {tuple(output.shape)}."
                )
            output = output[:, first:last]
        found[task.name] = output
    return found


def spare(raw: object, tasks: Iterable[Task]) -> tuple[str, ...]:
    """What forward returned that is no task's, by name or number."""
    keys = raw if isinstance(raw, Mapping) else range(len(raw)) if isinstance(raw, tuple | list) else ()
    taken = {task.output for task in tasks}
    return tuple(str(key) for key in keys if key not in taken)


def _pick(raw: object, task: Task) -> Tensor:
    if isinstance(raw, Tensor):
        raw = (raw,)
    if isinstance(raw, Mapping):
        found = raw.get(task.output)
        names = [str(key) for key in raw]
    elif isinstance(raw, tuple | list):
        known = isinstance(task.output, int) and 0 <= task.output < len(raw)
        found = raw[int(task.output)] if known else None
        names = [str(k) for k in range(len(raw))]
    else:
        raise CompressError(f"The network returns a {type(raw).__name__}; a tensor, a tuple or a dict is needed.")
    if not isinstance(found, Tensor):
        what = "is not among the network's outputs" if found is None else f"is a {type(found).__name__}, not a tensor"
        hint = did_you_mean(str(task.output), names)
        raise CompressError(f"Task '{task.name}': output {task.output!r} {what}.{hint}")
    return found
