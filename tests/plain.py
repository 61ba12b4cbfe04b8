"""A workload around any network: random inputs, and its own answers, a little off, as labels."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError

from compressor.bench import Bench
from compressor.budgets import Budget
from compressor.model import MultiTaskModel
from compressor.progress import Silent
from compressor.workload import Batch, Split, Task, answers

SEEDS: Mapping[str, int] = {"train": 100, "calibrate": 7, "validate": 9}


class Plain:
    """Three batches of each split; every task is scored by its mean absolute error."""

    normalisation = ""

    def __init__(
        self, make: Callable[[], nn.Module], inputs: tuple[Tensor, ...], tasks: tuple[Task, ...], batch_size: int = 4
    ) -> None:
        self.make, self.inputs, self.tasks, self.batch_size = make, inputs, tasks, batch_size
        self.taught = self.build().eval()

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return self.inputs

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        chance = torch.Generator().manual_seed(SEEDS[split] + (seed if split == "train" else 0))
        for _ in range(3):
            sizes = [(self.batch_size, *x.shape[1:]) for x in self.inputs]
            drawn = tuple(
                torch.randn(size, generator=chance, dtype=x.dtype) for size, x in zip(sizes, self.inputs, strict=True)
            )
            with torch.no_grad():
                given = answers(self.taught(*drawn), self.tasks)
            labels = {k: v + 0.1 * torch.randn(v.shape, generator=chance, dtype=v.dtype) for k, v in given.items()}
            yield Batch(drawn, labels)

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {name: mse_loss(outputs[name], label) for name, label in batch.labels.items()}

    def metrics(self) -> Mapping[str, Metric]:
        return {task.name: MeanAbsoluteError() for task in self.tasks}


def task(name: str = "t", channels: tuple[int, int] | None = None) -> Task:
    """The first output, or some of its channels; less is better."""
    return Task(name, channels=channels, metric="mae", higher_is_better=False)


def setup(
    make: Callable[[], nn.Module], inputs: tuple[Tensor, ...], folder: Path, *tasks: Task, batch_size: int = 4,
    **budgets: float | str,
) -> tuple[MultiTaskModel, Bench]:
    """The network and a bench around it, scored; widths need be multiples of nothing."""
    workload = Plain(make, inputs, tasks or (task(),), batch_size)
    model = MultiTaskModel(workload.build().eval(), workload.tasks, inputs)
    parsed = {name: Budget.parse(text) for name, text in budgets.items()}
    bench = Bench(workload, model, parsed, 1, 0, Silent(), directory=folder)
    bench.before = bench.scores(model)
    return model, bench
