"""One U-shaped trunk that knows no degradation and a small head for each, which adds what is wrong with the picture.

Pictures are taken to half and to a quarter of their size, where most of the weights and of the work are, and back, with
the sum of what was there on the way down. Without normalisation, as Lim et al., "EDSR", CVPRW 2017: a batch holds one
degradation, so statistics of batches would jump from step to step.
"""

from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from .degradations import DEGRADATIONS

FULL, HALF, QUARTER, BLOCKS, HEAD = 32, 64, 128, 4, 16


class RestorationNet(nn.Module):
    """(N, 1, H, W) grey float, H and W multiples of 4 -> the restored picture, of the same shape, from each head.

    Source: one encoder for all degradations after Li et al., "All-in-one image restoration", CVPR 2022; residual blocks
    in a U after Zhang et al., "DRUNet", TPAMI 2021; the answer as a correction of the input after Zhang et al.,
    "DnCNN", TIP 2017. 1.46 million parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, FULL, 3, padding=1)
        self.to_half = nn.Conv2d(FULL, HALF, 3, stride=2, padding=1)
        self.before = Block(HALF)
        self.to_quarter = nn.Conv2d(HALF, QUARTER, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(QUARTER) for _ in range(BLOCKS)))
        self.from_quarter = nn.Conv2d(QUARTER, HALF, 1)
        self.after = Block(HALF)
        self.from_half = nn.Conv2d(HALF, FULL, 1)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(FULL, HEAD, 3, padding=1), nn.ReLU(), nn.Conv2d(HEAD, 1, 3, padding=1))
                for name in DEGRADATIONS
            }
        )

    def forward(self, picture: Tensor) -> dict[str, Tensor]:
        full = relu(self.stem(picture))
        half = self.before(relu(self.to_half(full)))
        quarter = self.blocks(relu(self.to_quarter(half)))
        half = self.after(half + _twice(self.from_quarter(quarter)))
        features = relu(full + _twice(self.from_half(half)))
        return {name: picture + head(features) for name, head in self.heads.items()}


def _twice(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest")


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(x)))
