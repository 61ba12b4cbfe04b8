"""Two-task networks of the kinds people deploy, untrained: what the CPU benchmark compiles beside the examples."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention


class ResNet(nn.Module):
    """ResNet-18's trunk (He et al., CVPR 2016) at 224 x 224: a class of the picture, and eight maps of 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        widths = (64, 64, 128, 256, 512)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Basic(before, after, 1 if before == after else 2), _Basic(after, after, 1))
                for before, after in pairwise(widths)
            )
        )
        self.label = nn.Linear(512, 100)
        self.maps = nn.Sequential(_conv(512, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stages(self.stem(x))
        return self.label(features.mean((2, 3))), self.maps(features)


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018) at 224 x 224: a class of the picture, and eight maps of 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2), nn.ReLU6()]
        width = 32
        for expansion, outputs, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for number in range(count):
                layers.append(_Inverted(width, outputs, stride if number == 0 else 1, expansion))
                width = outputs
        self.trunk = nn.Sequential(*layers, _conv(320, 1280, 1), nn.ReLU6())
        self.label, self.maps = nn.Linear(1280, 100), nn.Conv2d(1280, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.label(features.mean((2, 3))), self.maps(features)


class Transformer(nn.Module):
    """A small ViT (Dosovitskiy et al., ICLR 2021), 196 tokens of 192: a class of the picture, and a map of 14 x 14."""

    def __init__(self, width: int = 192, layers: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 196, width) * 0.02)
        self.layers = nn.Sequential(*(_Attending(width, 3) for _ in range(layers)))
        self.label, self.maps = nn.Linear(width, 100), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.layers(self.patches(x).flatten(2).transpose(1, 2) + self.position)
        return self.label(tokens.mean(1)), self.maps(tokens)


class Recommender(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018) over 256 features of 64 candidates: click and dwell time."""

    def __init__(self, features: int = 256, experts: int = 8, width: int = 256) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            for _ in range(experts)
        )
        self.gates = nn.ModuleList(nn.Linear(features, experts) for _ in range(2))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        known = torch.stack([expert(x) for expert in self.experts], 1)
        click, dwell = (
            tower((gate(x).softmax(-1).unsqueeze(-1) * known).sum(1))
            for gate, tower in zip(self.gates, self.towers, strict=True)
        )
        return click, dwell


def sparsify(module: nn.Module, density: float) -> nn.Module:
    """Leave the largest `density` of each convolution's and linear layer's weights; first layer and answers stay whole.

    Layer by layer and by magnitude, as a ticket is; every layer of a network of random weights then has that density.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    inner = [layer for layer in layers[1:] if layer.weight[0].numel() > 9 and len(layer.weight) > 16]
    with torch.no_grad():
        for layer in inner:
            size = np.abs(layer.weight.numpy())
            layer.weight.mul_(torch.from_numpy(size >= np.quantile(size, 1 - density)))
    return module


class _Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(inputs, outputs, 3, stride), _conv(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        wider = [_conv(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        each = [_conv(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
        self.body = nn.Sequential(*wider, *each, _conv(hidden, outputs, 1))
        self.adds = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class _Attending(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.after(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
