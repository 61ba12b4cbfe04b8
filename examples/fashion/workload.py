"""MultiFashion: two overlapping Fashion-MNIST items in one picture, and two tasks, the class of either."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from compressor.workload import Batch, Split, Task

from .dataset import CLASSES, SIZE, altered, check, items, overlap
from .network import FashionNet

CALIBRATE_EVERY = 12
"""One training item in twelve is for "calibrate" alone; "validate" is made of the ten thousand test items."""


class MultiFashion:
    """The classes of the upper left ("left") and of the lower right item ("right"), read from the folder `root`.

    An item is left once and right once in an epoch, in pairs that the seed draws, mirrored or not and moved a little;
    those of "calibrate" and "validate" are as they come, and the same whatever the seed.

    Raises:
        CompressError: `root` lacks Fashion-MNIST's files.
    """

    tasks = tuple(Task(name, output=name, metric="accuracy") for name in ("left", "right"))
    normalisation = "Grey, bright items on black, divided by 255. Answers: logits of " + ", ".join(CLASSES) + "."

    def __init__(self, root: str = "/usr/share/datasets/fashion-mnist", batch_size: int = 128) -> None:
        self.root = Path(root)
        self.batch_size = batch_size
        check(self.root)

    def build(self) -> nn.Module:
        return FashionNet()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        """"train" drops an incomplete last batch."""
        pictures, classes = items(self.root, "t10k" if split == "validate" else "train")
        rows = _rows(len(classes), split)
        rng = np.random.default_rng(seed if split == "train" else 0)
        left, right = rng.permutation(rows), rng.permutation(rows)
        end = len(rows) - len(rows) % self.batch_size if split == "train" else len(rows)
        for first in range(0, end, self.batch_size):
            pair = [chosen[first : first + self.batch_size] for chosen in (left, right)]
            drawn = [pictures[chosen] for chosen in pair]
            picture = overlap(*([altered(one, rng) for one in drawn] if split == "train" else drawn))
            labels = {
                task.name: torch.from_numpy(classes[chosen].astype(np.int64))
                for task, chosen in zip(self.tasks, pair, strict=True)
            }
            yield Batch((torch.from_numpy(picture).unsqueeze(1).float() / 255,), labels)

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Cross entropy."""
        return {name: cross_entropy(outputs[name], label) for name, label in batch.labels.items() if name in outputs}

    def metrics(self) -> Mapping[str, Metric]:
        return {task.name: MulticlassAccuracy(len(CLASSES), average="micro") for task in self.tasks}


def _rows(count: int, split: Split) -> NDArray[np.intp]:
    rows = np.arange(count)
    held_out = rows % CALIBRATE_EVERY == CALIBRATE_EVERY - 1
    return {"train": rows[~held_out], "calibrate": rows[held_out], "validate": rows}[split]
