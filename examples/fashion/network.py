"""Hard sharing: a small residual trunk that both tasks read, and a head with one hidden layer for each."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from .dataset import CLASSES

WIDTHS = (32, 64, 128, 256)
HIDDEN = 128


class FashionNet(nn.Module):
    """(N, 1, 36, 36) grey float in [0, 1] -> {"left": (N, 10), "right": (N, 10)} logits; 1.29 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        first, *_, last = WIDTHS
        self.stem = nn.Conv2d(1, first, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(first)
        narrowing = (Residual(inputs, outputs, 2) for inputs, outputs in pairwise(WIDTHS))
        self.stages = nn.Sequential(Residual(first, first), *narrowing)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(last, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(CLASSES)))
                for name in ("left", "right")
            }
        )

    def forward(self, picture: Tensor) -> dict[str, Tensor]:
        x = self.stages(relu(self.norm(self.stem(picture))))
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
        return {name: head(pooled) for name, head in self.heads.items()}


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
