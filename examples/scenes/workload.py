"""The embedded workload: a procedural room seen by a camera, and three tasks on every pixel, after NYUv2."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torchmetrics import Metric

from compressor.workload import Batch, Split, Task

from .dataset import scenes
from .metrics import AbsoluteRelativeError, MeanAngle, MeanIoU
from .network import SceneNet
from .world import CLASSES, SIZE

PALETTE = np.array(
    [[205, 205, 235], [190, 180, 140], [125, 85, 50], [80, 210, 230], [215, 90, 200],
     [160, 70, 20], [220, 50, 50], [70, 190, 80], [60, 90, 220], [240, 200, 50]],
    np.uint8,
)  # fmt: skip
FARTHEST_M = 6.0


class Scenes:
    """Segmentation, depth and normals of rooms; a split's scenes are the first so many of its own endless row."""

    tasks = (
        Task("segmentation", output="segmentation", metric="mIoU", higher_is_better=True),
        Task("depth", output="depth", metric="abs_rel", higher_is_better=False),
        Task("normals", output="normals", metric="mean_angle_deg", higher_is_better=False),
    )
    normalisation = (
        "RGB, divided by 255. Answers: segmentation logits of "
        + ", ".join(CLASSES)
        + "; depth as ln(metres along z); normals of any length, in camera axes (x right, y down, z forward)."
    )

    def __init__(
        self, train_scenes: int = 4000, validate_scenes: int = 400, calibrate_scenes: int = 128, batch_size: int = 32
    ) -> None:
        self.scenes = {"train": train_scenes, "calibrate": calibrate_scenes, "validate": validate_scenes}
        self.batch_size = batch_size

    def build(self) -> nn.Module:
        return SceneNet()

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        """In order; "train" is shuffled, mirrors half of the scenes, and drops an incomplete last batch."""
        records = scenes(split, self.scenes[split])
        if split != "train":
            for first in range(0, len(records), self.batch_size):
                yield _batch(records[first : first + self.batch_size].copy(), None)
            return
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(records))
        for first in range(0, len(order) - self.batch_size + 1, self.batch_size):
            chosen = order[first : first + self.batch_size]
            yield _batch(records[chosen], torch.from_numpy(rng.random(self.batch_size) < 0.5))

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Cross entropy; L1 of ln(metres), near the relative error; chord between unit normals, near their angle."""
        judged = [task.name for task in self.tasks if task.name in outputs and task.name in batch.labels]
        return {name: JUDGE[name](outputs[name].float(), batch.labels[name]) for name in judged}

    def metrics(self) -> Mapping[str, Metric]:
        return {"segmentation": MeanIoU(len(CLASSES)), "depth": AbsoluteRelativeError(), "normals": MeanAngle()}

    def pictures(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, NDArray[np.uint8]]:
        """RGB uint8 (H, W, 3) of the batch's first scene: "input", and each task's answer and "<task> truth"."""
        drawn = {"input": _bytes(batch.inputs[0][0])}
        for name, answer in outputs.items():
            first = answer[0].detach().float()
            drawn[name] = DRAW[name](first.argmax(0) if name == "segmentation" else first)
            if name in batch.labels:
                truth = batch.labels[name][0]
                drawn[f"{name} truth"] = DRAW[name](truth.log() if name == "depth" else truth)
        return drawn


JUDGE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "segmentation": cross_entropy,
    "depth": lambda log_depth, depth: (log_depth - depth.log()).abs().mean(),
    "normals": lambda normals, label: _length(normals / _length(normals) - label).mean(),
}
DRAW: Mapping[str, Callable[[Tensor], NDArray[np.uint8]]] = {
    "segmentation": lambda classes: PALETTE[classes.cpu().numpy()],
    "depth": lambda log_depth: _bytes((1 - log_depth.exp() / FARTHEST_M).expand(3, -1, -1)),
    "normals": lambda normals: _bytes((normalize(normals, dim=0) * torch.tensor([1, -1, -1]).view(3, 1, 1) + 1) / 2),
}


def _length(vectors: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W), never zero, so that its gradient exists everywhere."""
    return (vectors.square().sum(1, keepdim=True) + 1e-6).sqrt()


def _bytes(picture: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) in [0, 1] as (H, W, 3) bytes."""
    return (picture.clamp(0, 1) * 255 + 0.5).byte().permute(1, 2, 0).contiguous().cpu().numpy()


def _batch(records: NDArray[Any], mirrored: Tensor | None) -> Batch:
    """A batch of `dataset.scenes`' records; a mirrored scene's normals point the other way along x."""
    image = torch.from_numpy(records["image"]).permute(0, 3, 1, 2).float() / 255
    segmentation = torch.from_numpy(records["segmentation"]).long()
    depth = torch.from_numpy(records["depth"]).float()
    normals = torch.from_numpy(records["normals"]).float()
    if mirrored is not None:
        for pixels in (image, segmentation, depth, normals):
            pixels[mirrored] = pixels[mirrored].flip(-1)
        normals[mirrored, 0] *= -1
    return Batch((image.contiguous(),), {"segmentation": segmentation, "depth": depth, "normals": normals})
