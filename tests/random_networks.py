"""Random small multi-task networks of the operators that are compiled: any graph, odd sizes, odd weights."""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RandomNetwork(nn.Module):
    """A graph of `steps` random operators over one picture, and two or three answers read from anywhere in it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        torch.manual_seed(seed)
        self.parts = nn.ModuleList()
        self.steps: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        pick = self.chance
        size = pick.randint(6, 21), pick.randint(6, 21)
        self.shape = (pick.choice([1, 1, 1, 2]), pick.choice([1, 3, 4, 16, 19]), *size)
        self.shapes: list[tuple[int, ...]] = [self.shape]
        for _ in range(pick.randint(3, 9)):
            self._grow()
        self.answers = [self._answer(source) for source in self._sources(pick.randint(2, 3))]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, sources in self.steps:
            values.append(step(*(values[k] for k in sources)))
        return tuple(step(values[k]) for step, k in self.answers)

    def _sources(self, count: int) -> list[int]:
        """Of the answers: what was made last, and others at random."""
        last = len(self.shapes) - 1
        return [last, *(self.chance.randint(max(0, last - 4), last) for _ in range(count - 1))]

    def _keep(self, part: nn.Module) -> nn.Module:
        """Register a part; a third of those with weights lose most of them."""
        self.parts.append(part.eval())
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and self.chance.random() < 0.4:
            density = self.chance.choice([0.0, 0.05, 0.1, 0.3])
            weight.data.mul_(torch.rand(weight.shape) < density)
        return part

    def _grow(self) -> None:
        """Add one operator; what does not fit where it was drawn is drawn again."""
        while True:
            source = self.chance.randint(max(0, len(self.shapes) - 3), len(self.shapes) - 1)
            made = self.chance.choice(_OPERATORS)(self, self.shapes[source])
            if made is None:
                continue
            step, others = made
            with torch.no_grad():
                shape = tuple(step(*(torch.zeros(self.shapes[k]) for k in (source, *others))).shape)
            if min(shape) >= 1 and torch.Size(shape).numel() < 40_000:
                self.steps.append((step, (source, *others)))
                self.shapes.append(shape)
                return

    def _answer(self, source: int) -> tuple[Callable[[Tensor], Tensor], int]:
        shape = self.shapes[source]
        kinds = ["map", "pooled", "flat", *["softmax"] * (shape[2] * shape[3] > 1)]  # of one value it is a constant
        kind = self.chance.choice(kinds)
        if kind == "map":
            return self._keep(nn.Conv2d(shape[1], self.chance.randint(1, 9), 1)), source
        if kind == "softmax":
            return lambda x: torch.softmax(x.flatten(2), -1), source
        count = shape[1] if kind == "pooled" else shape[1] * shape[2] * shape[3]
        linear = self._keep(nn.Linear(count, self.chance.choice([1, 5, 17, 32])))
        return (lambda x: linear(x.mean((2, 3)))) if kind == "pooled" else (lambda x: linear(x.flatten(1))), source


Shape = tuple[int, ...]
Made = tuple[Callable[..., Tensor], tuple[int, ...]] | None


def _convolution(net: RandomNetwork, shape: Shape) -> Made:
    pick = net.chance
    groups = pick.choice([1, 1, 1, shape[1], *(g for g in (2, 3, 4) if shape[1] % g == 0)])
    outputs = groups * pick.choice([1, 2]) if groups == shape[1] else groups * pick.choice([1, 4, 5, 8, 16])
    kernel = (pick.randint(1, 4), pick.randint(1, 4)) if pick.random() < 0.4 else (pick.choice([1, 3, 3, 5]),) * 2
    dilation = pick.choice([1, 1, 1, 2])
    padding = tuple(pick.randint(0, size * dilation // 2) for size in kernel)
    if any(dilation * (k - 1) + 1 > size + 2 * p for k, size, p in zip(kernel, shape[2:], padding, strict=True)):
        return None
    conv = nn.Conv2d(
        shape[1], min(outputs, 64) // groups * groups or groups, kernel, pick.choice([1, 1, 1, 2, 3]),
        padding, dilation, groups, bias=pick.random() < 0.7,
    )
    parts: list[nn.Module] = [net._keep(conv)]
    if pick.random() < 0.4:
        norm = nn.BatchNorm2d(conv.out_channels)
        norm.running_var = torch.rand(conv.out_channels) + 0.5
        norm.running_mean = torch.randn(conv.out_channels) * 0.1
        parts.append(norm)
    if pick.random() < 0.6:
        parts.append(pick.choice([nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU, nn.Hardswish])())
    return net._keep(nn.Sequential(*parts)), ()


def _transposed(net: RandomNetwork, shape: Shape) -> Made:
    stride = net.chance.choice([1, 2])
    kernel = stride + net.chance.choice([0, 1, 2])
    padding = net.chance.randint(0, (kernel - 1) // 2)
    conv = nn.ConvTranspose2d(shape[1], net.chance.choice([4, 7, 16]), kernel, stride, padding)
    return net._keep(conv), ()


def _element(net: RandomNetwork, shape: Shape) -> Made:
    kinds: list[Callable[[Tensor], Tensor]] = [
        torch.relu, torch.sigmoid, torch.tanh, F.gelu, F.silu, F.hardswish, F.relu6, torch.abs, F.elu,
        lambda x: x * 0.5 + 1.0, lambda x: torch.clamp(x, -0.5, 0.75), lambda x: torch.exp(-x.abs()),
    ]
    return net.chance.choice(kinds), ()


def _binary(net: RandomNetwork, shape: Shape) -> Made:
    others = [k for k, other in enumerate(net.shapes) if other == shape]
    kinds: list[Callable[[Tensor, Tensor], Tensor]] = [torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum]
    return net.chance.choice(kinds), (net.chance.choice(others),)


def _joined(net: RandomNetwork, shape: Shape) -> Made:
    others = [k for k, other in enumerate(net.shapes) if (other[0], *other[2:]) == (shape[0], *shape[2:])]
    return (lambda x, y: torch.cat([x, y], 1)), (net.chance.choice(others),)


def _pooled(net: RandomNetwork, shape: Shape) -> Made:
    kernel, stride = net.chance.choice([2, 3]), net.chance.choice([1, 2])
    if min(shape[2:]) < kernel:
        return None
    kind = net.chance.choice([nn.MaxPool2d, nn.AvgPool2d])
    return kind(kernel, stride, net.chance.randint(0, 1), ceil_mode=net.chance.random() < 0.3), ()


def _resized(net: RandomNetwork, shape: Shape) -> Made:
    size = [max(1, round(extent * net.chance.choice([0.5, 1.5, 2]))) for extent in shape[2:]]
    mode = net.chance.choice(["nearest", "bilinear"])
    return (lambda x: F.interpolate(x, size, mode=mode)), ()


def _gated(net: RandomNetwork, shape: Shape) -> Made:
    gate = net._keep(nn.Sequential(nn.Conv2d(shape[1], 4, 1), nn.ReLU(), nn.Conv2d(4, shape[1], 1), nn.Sigmoid()))
    return (lambda x: x * gate(x.mean((2, 3), keepdim=True))), ()


def _shuffled(net: RandomNetwork, shape: Shape) -> Made:
    if shape[1] % 4 == 0:
        return nn.PixelShuffle(2), ()
    return (nn.PixelUnshuffle(2), ()) if shape[2] % 2 == shape[3] % 2 == 0 else None


def _cut(net: RandomNetwork, shape: Shape) -> Made:
    if shape[1] < 3:
        return None
    first = net.chance.randint(0, shape[1] - 2)
    return (lambda x: x[:, first : first + 2]) if net.chance.random() < 0.5 else (lambda x: x[:, :, 1:]), ()


def _attention(net: RandomNetwork, shape: Shape) -> Made:
    width, heads = 8 * net.chance.choice([1, 2, 3]), net.chance.choice([1, 2])
    if shape[2] * shape[3] > 200:
        return None
    into, norm = net._keep(nn.Linear(shape[1], 3 * width)), net._keep(nn.LayerNorm(shape[1]))
    out = net._keep(nn.Linear(width, shape[1]))

    def attend(x: Tensor) -> Tensor:
        n, channels, height, wide = x.shape
        tokens = norm(x.flatten(2).transpose(1, 2))
        q, k, v = (part.reshape(n, height * wide, heads, -1).transpose(1, 2) for part in into(tokens).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * wide, width)
        return x + out(mixed).transpose(1, 2).reshape(n, channels, height, wide)

    return attend, ()


_OPERATORS: list[Callable[[RandomNetwork, Shape], Made]] = [
    *[_convolution] * 8, _transposed, *[_element] * 3, *[_binary] * 3, _joined, *[_pooled] * 2, _resized, _gated,
    _shuffled, _cut, _attention,
]  # fmt: skip
