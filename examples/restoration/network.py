"""One trunk that knows no degradation and a small head for each, which adds what is wrong with the picture.

A convolution at full size, residual blocks at half size (most of the work, at a quarter of the price), and their sum at
full size again. Without normalisation, as Lim et al., "EDSR", CVPRW 2017: a batch holds one degradation, so statistics
of batches would jump from step to step.
"""

from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from .degradations import DEGRADATIONS

FULL, HALF, BLOCKS, HEAD = 32, 64, 4, 16


class RestorationNet(nn.Module):
    """(N, 1, H, W) grey float, even H and W -> the restored picture, of the same shape, from each task's head.

    Source: one encoder for all degradations after Li et al., "All-in-one image restoration", CVPR 2022; the answer as
    a correction of the input after Zhang et al., "DnCNN", TIP 2017. 0.34 million parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, FULL, 3, padding=1)
        self.down = nn.Conv2d(FULL, HALF, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(HALF) for _ in range(BLOCKS)))
        self.up = nn.Conv2d(HALF, FULL, 1)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(FULL, HEAD, 3, padding=1), nn.ReLU(), nn.Conv2d(HEAD, 1, 3, padding=1))
                for name in DEGRADATIONS
            }
        )

    def forward(self, picture: Tensor) -> dict[str, Tensor]:
        full = relu(self.stem(picture))
        half = self.up(self.blocks(relu(self.down(full))))
        features = relu(full + interpolate(half, scale_factor=2.0, mode="nearest"))
        return {name: picture + head(features) for name, head in self.heads.items()}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(x)))
