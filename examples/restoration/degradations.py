"""What is done to a photograph: (N, 1, H, W) in [0, 1] and a generator -> the same shape, worse."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

BLOCK = 8
LUMINANCE = torch.tensor(
    [[16, 11, 10, 16, 24, 40, 51, 61],
     [12, 12, 14, 19, 26, 58, 60, 55],
     [14, 13, 16, 24, 40, 57, 69, 56],
     [14, 17, 22, 29, 51, 87, 80, 62],
     [18, 22, 37, 56, 68, 109, 103, 77],
     [24, 35, 55, 64, 81, 104, 113, 92],
     [49, 64, 78, 87, 103, 121, 120, 101],
     [72, 92, 95, 98, 112, 100, 103, 99]],
    dtype=torch.float64,
)  # fmt: skip
"""Quantisation of luminance at quality 50: ITU-T T.81, table K.1."""


def noise(clean: Tensor, generator: Generator, sigma: float) -> Tensor:
    """White Gaussian noise, `sigma` of 255 strong, not clipped."""
    return clean + sigma / 255 * torch.randn(clean.shape, generator=generator)


def jpeg(clean: Tensor, generator: Generator, quality: int) -> Tensor:
    """What JPEG's quantisation leaves at this quality (1 to 100), as libjpeg scales the table; no dice are thrown.

    Height and width are multiples of 8.
    """
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = ((LUMINANCE * scale + 50) / 100).floor().clamp(1, 255)
    samples = (clean.double() * 255).round().clamp(0, 255) - 128
    blocks = samples.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4)
    cosines = _cosines()
    kept = (cosines @ blocks @ cosines.T / steps).round() * steps
    back = (cosines.T @ kept @ cosines).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return ((back + 128).round().clamp(0, 255) / 255).float()


def upscale(clean: Tensor, generator: Generator, factor: int) -> Tensor:
    """Bicubic to one in `factor` and bicubic back to size; no dice are thrown."""
    small = interpolate(clean, scale_factor=1 / factor, mode="bicubic", align_corners=False, antialias=True)
    return interpolate(small, scale_factor=factor, mode="bicubic", align_corners=False).clamp(0, 1)


DEGRADATIONS: Mapping[str, Callable[[Tensor, Generator], Tensor]] = {
    "denoise15": partial(noise, sigma=15),
    "denoise25": partial(noise, sigma=25),
    "denoise50": partial(noise, sigma=50),
    "deblock": partial(jpeg, quality=10),
    "upscale2": partial(upscale, factor=2),
}
"""By task."""


def _cosines() -> Tensor:
    """The orthonormal DCT-II, (8, 8): frequencies by samples."""
    frequency, sample = torch.arange(BLOCK, dtype=torch.float64).view(-1, 1), torch.arange(BLOCK, dtype=torch.float64)
    basis = torch.cos(math.pi * frequency * (2 * sample + 1) / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis
