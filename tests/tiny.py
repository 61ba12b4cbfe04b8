"""A multi-task network that is trained in a second: 16x16 pictures of one bar, three tasks, two kinds of batch.

The tasks `kind` (which of three bars) and `size` share one fused output layer; `mask` is a dense map. Batches take
turns: one labels `kind` and `mask`, the next labels `size` alone.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, mse_loss
from torchmetrics import Metric
from torchmetrics.classification import BinaryJaccardIndex, MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError

from compressor.bench import Bench
from compressor.budgets import Budget
from compressor.model import MultiTaskModel, load_weights
from compressor.progress import Silent
from compressor.workload import Batch, Split, Task, Workload

SIZE = 16
COUNTS: Mapping[str, int] = {"train": 16, "calibrate": 4, "validate": 8}
SEEDS: Mapping[str, int] = {"train": 1000, "calibrate": 2000, "validate": 3000}


class TinyNet(nn.Module):
    """A residual trunk of 16 and 32 channels, a fused head and an upsampled map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32))
        self.fused = nn.Linear(32, 4)
        self.mask = nn.Sequential(nn.Conv2d(32, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.down(self.stem(x))
        x = torch.relu(x + self.outer(self.inner(x)))
        mask = interpolate(self.mask(x), scale_factor=2.0, mode="nearest")
        return {"fused": self.fused(x.mean((2, 3))), "mask": mask}


class Tiny:
    """`batch_size` pictures a batch; `split_labels=False` labels every task in every batch."""

    tasks = (
        Task("kind", output="fused", channels=(0, 3), metric="accuracy"),
        Task("size", output="fused", channels=(3, 4), metric="mae", higher_is_better=False),
        Task("mask", output="mask", metric="IoU"),
    )
    normalisation = "Grey in [0, 1]."

    def __init__(self, batch_size: int = 32, split_labels: bool = True) -> None:
        self.batch_size, self.split_labels = batch_size, split_labels

    def build(self) -> nn.Module:
        return TinyNet()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        chance = torch.Generator().manual_seed(SEEDS[split] + (seed if split == "train" else 0))
        for index in range(COUNTS[split]):
            image, labels = pictures(self.batch_size, chance)
            if self.split_labels:
                named = ("kind", "mask") if index % 2 == 0 else ("size",)
                labels = {name: labels[name] for name in named}
            yield Batch((image,), labels)

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        judge = {"kind": cross_entropy, "size": mse_loss, "mask": binary_cross_entropy_with_logits}
        return {name: judge[name](outputs[name], label) for name, label in batch.labels.items()}

    def metrics(self) -> Mapping[str, Metric]:
        accuracy = MulticlassAccuracy(3, average="micro")
        return {"kind": accuracy, "size": MeanAbsoluteError(), "mask": BinaryJaccardIndex()}


def pictures(count: int, chance: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy pictures of a vertical, a horizontal or a square bar, 3 to 8 pixels wide, with every label."""
    kind = torch.randint(0, 3, (count,), generator=chance)
    size = torch.randint(3, 9, (count,), generator=chance)
    at = torch.randint(0, SIZE - 8, (count, 2), generator=chance)
    row, column = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None, :]
    long = torch.tensor(SIZE)
    mask = torch.stack(
        [
            (row >= (0 if k == 0 else y))
            & (row < (long if k == 0 else y + s))
            & (column >= (0 if k == 1 else x))
            & (column < (long if k == 1 else x + s))
            for k, s, (y, x) in zip(kind, size, at, strict=True)
        ]
    ).float()[:, None]
    image = 0.6 * mask + 0.4 * torch.rand(mask.shape, generator=chance)
    return image, {"kind": kind, "size": size[:, None].float() / 8, "mask": mask}


@cache
def weights() -> Path:
    """A safetensors file with the weights of a trained network, trained once a process from a fixed seed."""
    torch.manual_seed(0)
    workload = Tiny(split_labels=False)
    module = workload.build()
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 160)
    for epoch in range(10):
        for batch in workload.batches("train", epoch):
            raw = module(*batch.inputs)
            outputs = {"kind": raw["fused"][:, :3], "size": raw["fused"][:, 3:], "mask": raw["mask"]}
            optimiser.zero_grad()
            sum(workload.losses(outputs, batch).values()).backward()
            optimiser.step()
            schedule.step()
    path = Path(tempfile.mkdtemp(prefix="taskpress-tests-")) / "tiny.safetensors"
    save_file(module.state_dict(), path)
    return path


def model(workload: Workload | None = None) -> MultiTaskModel:
    """The trained network."""
    workload = workload or Tiny()
    module = workload.build()
    load_weights(module, weights())
    return MultiTaskModel(module.eval(), workload.tasks, workload.example_inputs())


def without_norms(workload: Workload) -> MultiTaskModel:
    """An untrained network of the same kind that has no batch norm, so that pictures do not hang on others."""
    torch.manual_seed(0)
    module = workload.build()
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(part, name, nn.Identity())
    return MultiTaskModel(module.eval(), workload.tasks, workload.example_inputs())


def bench(original: MultiTaskModel, folder: Path, workload: Workload | None = None, **budgets: float | str) -> Bench:
    """A bench around a network, scored."""
    parsed = {name: Budget.parse(text) for name, text in budgets.items()}
    made = Bench(workload or Tiny(), original, parsed, 4, 0, Silent(), directory=folder)
    made.before = made.scores(original)
    return made


RECIPE = """\
name = "tiny"
device = "host"
threads = [1]
compute_threads = 1
task_sets = ["each", "all"]
verify_inputs = 2

[workload]
factory = "tiny.py:Tiny"
checkpoint = "{checkpoint}"

[budgets]
kind = 0.05
size = "60 %"
mask = "10 %"

[[stages]]
kind = "prune"
macs = 0.5
rounds = 2
round_to = 4
batches = 4
slack = 3.0
recover = {{ steps = 4, learning_rate = 2e-3 }}

[[stages]]
kind = "ticket"
keep_ratio = 0.5
rounds = 2
slack = 4.0
train = {{ steps = 8, learning_rate = 2e-3 }}

[[stages]]
kind = "finetune"
steps = 24
learning_rate = 2e-3

[[stages]]
kind = "pathway"

[measure]
seconds = 0.2
samples = 10
warmup_seconds = 0.02
"""


def recipe(folder: Path, **replaced: str) -> Path:
    """Write the recipe of a compression that takes seconds; `replaced` swaps the values of its lines."""
    lines = RECIPE.format(checkpoint=weights()).splitlines()
    for key, value in replaced.items():
        at = next(index for index, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[at] = f"{key} = {value}"
    shutil.copy(__file__, folder)  # the folder of a workload is part of what its results depend on
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
