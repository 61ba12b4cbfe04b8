"""The three figures NYUv2 is judged by, as torchmetrics; each is over all pixels seen, not a mean of batch means."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric


class MeanIoU(Metric):
    """Mean intersection over union of the classes that occur in the labels; logits (N, K, H, W), labels (N, H, W)."""

    full_state_update = False
    confusion: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        cells = labels.flatten() * self.classes + logits.argmax(1).flatten()
        self.confusion += torch.bincount(cells, minlength=self.classes**2).view(self.classes, self.classes)

    def compute(self) -> Tensor:
        hit = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        present = self.confusion.sum(1) > 0
        return (hit[present] / union[present]).mean()


class _PixelMean(Metric):
    full_state_update = False
    total: Tensor
    pixels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        self.total += values.double().sum()
        self.pixels += values.numel()

    def compute(self) -> Tensor:
        return (self.total / self.pixels).float()


class AbsoluteRelativeError(_PixelMean):
    """Mean of |depth - label| / label; the answer is ln(metres), labels are metres, both (N, 1, H, W)."""

    def update(self, log_depth: Tensor, depth: Tensor) -> None:
        self.add((log_depth.exp() - depth).abs() / depth)


class MeanAngle(_PixelMean):
    """Mean angle in degrees between normals (N, 3, H, W), whatever their length."""

    def update(self, normals: Tensor, labels: Tensor) -> None:
        self.add(cosine_similarity(normals.double(), labels.double(), dim=1).clamp(-1, 1).acos().rad2deg())
