"""DroNet's two tasks on frames that carry a label for one of them each; weights and frames lie outside this project."""

import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import affine_grid, binary_cross_entropy_with_logits, grid_sample, mse_loss
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import BinaryAccuracy

from compressor.errors import CompressError
from compressor.workload import Batch, Split, Task

from .network import DroNetV2

ARRAYS = {"steering": ("steer_frames", "steer"), "collision": ("collision_frames", "collision")}
"""Frames (n, 200, 200) uint8 and labels (n,) float32 of each task in `train.npz` and `validate.npz`."""

BLOCK, CALIBRATE_EVERY = 16, 6
"""Frames are films: one block of 16 in 6 of `train.npz` is "calibrate", so that few neighbours are split."""


class DroNet:
    """Steering (radians, column 0) and collision (logit, column 1) of one fused output; read from the folder `root`.

    Raises:
        CompressError: `root` lacks `train.npz` or `validate.npz`, or what they hold is not what `ARRAYS` says.
    """

    tasks = (
        Task("steering", output=0, channels=(0, 1), metric="rmse", higher_is_better=False),
        Task("collision", output=0, channels=(1, 2), metric="accuracy", higher_is_better=True),
    )
    normalisation = "Grey frame, divided by 255. Answers: steering in radians; collision as a logit, sigmoid(0) = 0.5."

    def __init__(
        self, root: str = "../shared/inputs/dronet", batch_size: int = 32, train_labels: bool = True
    ) -> None:
        """`train_labels=False` is for training on the original's answers alone: "train" then yields no label, and its
        frames are altered further, in ways that would make their labels wrong.
        """
        self.root = Path(root)
        self.batch_size, self.train_labels = batch_size, train_labels
        missing = [name for name in ("train.npz", "validate.npz") if not (self.root / name).is_file()]
        if missing:
            raise CompressError(
                f"DroNet's frames are not there: no {' and no '.join(missing)} in {self.root.resolve()}. "
                "Set the workload's option 'root' to the folder that holds them."
            )

    def build(self) -> nn.Module:
        return DroNetV2()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 1, 200, 200, generator=torch.Generator().manual_seed(0)),)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        """Batches of one task each; "train" shuffles frames and tasks, alters the frames as `_altered` says (without
        labels as `_moved` does, too), and drops each task's incomplete last batch.
        """
        rows = {task: _rows(len(_load(self._file(split), task)[1]), split) for task in ARRAYS}
        rng = np.random.default_rng(seed)
        if split != "train":
            plan = [(task, chosen) for task in ARRAYS for chosen in _cut(rows[task], self.batch_size)]
        else:
            plan = [
                (task, chosen)
                for task in ARRAYS
                for chosen in _cut(rng.permutation(rows[task]), self.batch_size)
                if len(chosen) == self.batch_size
            ]
            rng.shuffle(plan)
        for task, chosen in plan:
            frames, labels = _load(self._file(split), task)
            frame = torch.from_numpy(frames[chosen]).unsqueeze(1).float() / 255
            label = torch.from_numpy(labels[chosen]).unsqueeze(1)
            if split == "train":
                frame, label = _altered(frame, label, task, rng)
            if split == "train" and not self.train_labels:
                yield Batch((_moved(frame, rng),))
            else:
                yield Batch((frame,), {task: label})

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Mean squared error in radians, and binary cross entropy of the logit."""
        judge = {"steering": mse_loss, "collision": binary_cross_entropy_with_logits}
        return {task: judge[task](outputs[task], label) for task, label in batch.labels.items() if task in outputs}

    def metrics(self) -> Mapping[str, Metric]:
        return {"steering": MeanSquaredError(squared=False), "collision": LogitAccuracy()}

    def _file(self, split: Split) -> Path:
        return self.root / ("validate.npz" if split == "validate" else "train.npz")


class LogitAccuracy(BinaryAccuracy):
    """Accuracy at probability 0.5; the base class would take logits that happen to lie in [0, 1] for probabilities."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.sigmoid(), target)


def _rows(count: int, split: Split) -> NDArray[np.intp]:
    rows = np.arange(count)
    held_out = rows // BLOCK % CALIBRATE_EVERY == CALIBRATE_EVERY - 1
    return {"train": rows[~held_out], "calibrate": rows[held_out], "validate": rows}[split]


def _cut(rows: NDArray[np.intp], size: int) -> list[NDArray[np.intp]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _altered(frame: Tensor, label: Tensor, task: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Half of the frames mirrored, which turns their steering round, and each in a light and contrast of its own.

    There are about a thousand frames, so that a network trained on them as they are learns them by heart.
    """
    mirrored, contrast, light = (torch.from_numpy(rng.random(len(frame))).float() for _ in range(3))
    mirrored_N = mirrored < 0.5
    frame = torch.where(mirrored_N.view(-1, 1, 1, 1), frame.flip(-1), frame)
    mean = frame.mean((1, 2, 3), keepdim=True)
    contrast, light = 0.6 + 0.8 * contrast.view(-1, 1, 1, 1), 0.4 * (light.view(-1, 1, 1, 1) - 0.5)
    frame = ((frame - mean) * contrast + mean + light).clamp(0, 1)
    return frame, torch.where(mirrored_N.view(-1, 1), -label, label) if task == "steering" else label


def _moved(frame: Tensor, rng: np.random.Generator) -> Tensor:
    """Each frame nearer or farther, turned and shifted a little, and half of them with a share of another frame."""
    count = len(frame)
    zoom, turn, right, down, share = (torch.from_numpy(rng.random(count)).float() for _ in range(5))
    zoom, turn = 0.75 + 0.4 * zoom, 0.2 * (turn - 0.5)
    right, down, share = 0.3 * (right - 0.5), 0.3 * (down - 0.5), (0.8 * share - 0.4).clamp_min(0)
    rows = [zoom * turn.cos(), -zoom * turn.sin(), right, zoom * turn.sin(), zoom * turn.cos(), down]
    grid = affine_grid(torch.stack(rows, 1).view(count, 2, 3), list(frame.shape), align_corners=False)
    frame = grid_sample(frame, grid, padding_mode="reflection", align_corners=False)
    return torch.lerp(frame, frame.roll(1, 0), share.view(-1, 1, 1, 1))


@cache
def _load(file: Path, task: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A task's frames and labels, checked; kept in memory for the life of the process."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            frames, labels = (arrays[name] for name in ARRAYS[task])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        needed = " and ".join(ARRAYS[task])
        raise CompressError(f"{file} cannot be read as DroNet's frames ({needed}): {error}.") from error
    if frames.shape[1:] != (200, 200) or frames.dtype != np.uint8 or labels.shape != (len(frames),):
        raise CompressError(
            f"{file} holds {ARRAYS[task][0]} {frames.shape} {frames.dtype} and {ARRAYS[task][1]} {labels.shape}; "
            "needed are (n, 200, 200) uint8 and (n,)."
        )
    return frames, labels.astype(np.float32)
