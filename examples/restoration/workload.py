"""All-in-one restoration of grey photographs: five degradations, each a task with a head of its own."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio

from compressor.workload import Batch, Split, Task

from .degradations import DEGRADATIONS
from .network import RestorationNet
from .photographs import check, photographs

SIZE = 64
GRID = 4
"""Of "calibrate" and "validate": GRID x GRID crops of each photograph, evenly spaced."""


class Restoration:
    """Noise of sigma 15, 25 and 50, JPEG of quality 10, and a doubling of size; the label is the clean crop.

    A batch holds one degradation and a label for its task alone. Splits are of different photographs.

    Args:
        train_crops: crops of 64x64 in an epoch, each drawn anew by the epoch's seed.

    Raises:
        CompressError: scikit-image is not installed.
    """

    tasks = tuple(Task(name, output=name, metric="PSNR_dB") for name in DEGRADATIONS)
    normalisation = "Grey, divided by 255. Answers: the restored picture on the same scale; clip it to [0, 1]."

    def __init__(self, train_crops: int = 3200, batch_size: int = 8) -> None:
        self.train_crops = train_crops
        self.batch_size = batch_size
        check()

    def build(self) -> nn.Module:
        return RestorationNet()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        """Each run of five batches has every degradation, in "train" in an order of its own."""
        if split == "train":
            rng = np.random.default_rng(seed)
            generator = torch.Generator().manual_seed(seed)
            for number in range(self.train_crops // self.batch_size):
                if number % len(DEGRADATIONS) == 0:
                    order = rng.permutation(list(DEGRADATIONS))
                yield _batch(_drawn(rng, self.batch_size), str(order[number % len(DEGRADATIONS)]), generator)
            return
        generator = torch.Generator().manual_seed(0)
        for crops in torch.from_numpy(_spaced(split)).split(self.batch_size):
            for task in DEGRADATIONS:
                yield _batch(crops, task, generator)

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Mean absolute error."""
        return {name: l1_loss(outputs[name], label) for name, label in batch.labels.items() if name in outputs}

    def metrics(self) -> Mapping[str, Metric]:
        """PSNR in dB of all crops as one picture, answers clipped to [0, 1]; crops of sky would rule a mean of dB."""
        return {name: PeakSignalNoiseRatio(data_range=(0.0, 1.0)) for name in DEGRADATIONS}

    def pictures(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, NDArray[np.uint8]]:
        """The batch's first crop: as it came, the answer of its task's head, and as it was."""
        drawn = {"input": batch.inputs[0]}
        for name, label in batch.labels.items():
            drawn |= {name: outputs[name], f"{name} truth": label} if name in outputs else {}
        return {name: _bytes(picture[0]) for name, picture in drawn.items()}


def _batch(clean: Tensor, task: str, generator: torch.Generator) -> Batch:
    return Batch((DEGRADATIONS[task](clean, generator),), {task: clean})


def _drawn(rng: np.random.Generator, count: int) -> Tensor:
    """(count, 1, 64, 64): a photograph, a place and one of eight turns and mirrorings, all at even odds."""
    found, crops = photographs("train"), []
    for which in rng.integers(len(found), size=count):
        top, left = (rng.integers(length - SIZE + 1) for length in found[which].shape)
        crop = np.rot90(found[which][top : top + SIZE, left : left + SIZE], rng.integers(4))
        crops.append(crop if rng.random() < 0.5 else crop.T)
    return torch.from_numpy(np.stack(crops)).unsqueeze(1)


def _spaced(split: Split) -> NDArray[np.float32]:
    """(photographs * GRID^2, 1, 64, 64), the photographs taking turns."""
    crops = []
    for down in np.linspace(0, 1, GRID):
        for along in np.linspace(0, 1, GRID):
            for photograph in photographs(split):
                top, left = (int(at * (n - SIZE)) for at, n in zip((down, along), photograph.shape, strict=True))
                crops.append(photograph[top : top + SIZE, left : left + SIZE])
    return np.stack(crops)[:, None]


def _bytes(picture: Tensor) -> NDArray[np.uint8]:
    """(1, H, W) in [0, 1] as (H, W, 3) bytes."""
    grey = (picture.detach().float().clamp(0, 1) * 255 + 0.5).byte()
    return grey.permute(1, 2, 0).expand(-1, -1, 3).contiguous().cpu().numpy()
