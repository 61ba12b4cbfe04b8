"""Toy multi-task networks: blocks that each use one way of treating channels, and networks composed of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from compressor.model import MultiTaskModel
from compressor.workload import Batch, Split, Task

SIZE = 8
"""Height and width of every feature map between blocks."""


class Lambda(nn.Module):
    """Layers by name and a function of them and the features."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)  # type: ignore[arg-type]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


Built = tuple[nn.Module, int]


def _conv_bn_relu(c: int) -> Built:
    return nn.Sequential(conv(c, 12, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True)), 12


def _dropout(c: int) -> Built:
    return nn.Sequential(conv(c, 8), nn.Dropout2d(), nn.ReLU(), nn.Dropout()), 8


def _same_padding(c: int) -> Built:
    return nn.Sequential(nn.Conv2d(c, 8, 3, padding="same"), nn.Hardswish(inplace=True)), 8


def _residual(c: int) -> Built:
    return Lambda(lambda m, x: F.relu(x + m.b(F.relu(m.a(x)))), a=conv(c, 8), b=conv(8, c)), c


def _in_place_add(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        y = m.a(x)
        y += x
        y.mul_(0.5).add_(1, alpha=2)
        return y

    return Lambda(run, a=conv(c, c)), c


def _concat(c: int) -> Built:
    return Lambda(lambda m, x: torch.cat([m.a(x), x, m.b(x)], dim=-3), a=conv(c, 4), b=conv(c, 8)), c + 12


def _chunk_swap(c: int) -> Built:
    return Lambda(lambda m, x: torch.cat(m.a(x).chunk(2, dim=1)[::-1], 1), a=conv(c, 8)), 8


def _split(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        first, second, third = m.a(x).split([4, 4, 2], 1)
        return torch.cat([first + second, third], 1)

    return Lambda(run, a=conv(c, 10)), 6


def _halves(c: int) -> Built:
    """One half by literal numbers, the other one from the end."""
    return Lambda(lambda m, x: m.b(m.a(x)[:, :4]) + m.c(m.a(x)[:, -6:]), a=conv(c, 10), b=conv(4, 6), c=conv(6, 6)), 6


def _every_other(c: int) -> Built:
    return Lambda(lambda m, x: F.relu(m.a(x)[:, ::2]) - m.a(x)[:, 1::2], a=conv(c, 8)), 4


def _gate_by_one(c: int) -> Built:
    return Lambda(
        lambda m, x: m.a(x) * m.b(x)[:, 1:2].sigmoid() + m.b(x).select(1, 0)[:, None], a=conv(c, 8), b=conv(c, 3)
    ), 8


def _channel_shuffle(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        n, k, h, w = (y := m.a(x)).shape
        return y.view(n, 2, k // 2, h, w).transpose(1, 2).reshape(n, k, h, w)

    return Lambda(run, a=conv(c, 12)), 12


def _torch_shuffle(c: int) -> Built:
    return nn.Sequential(conv(c, 8), nn.ChannelShuffle(2)), 8


def _literal_view(c: int) -> Built:
    return Lambda(lambda m, x: m.a(x).view(-1, 4, 2, SIZE, SIZE).flatten(1, 2), a=conv(c, 8)), 8


def _stacked(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        return torch.stack([m.a(x), m.b(x)], 1).flatten(1, 2)

    return Lambda(run, a=conv(c, 4), b=conv(c, 4)), 8


def _split_unevenly(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        first, second, third = torch.tensor_split(m.a(x).tile(1, 2, 1, 1), 3, dim=-3)
        return first[:, :5] * second + third.rot90(1, (2, 3))

    return Lambda(run, a=conv(c, 8)), 5


def _unbound(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        first, second = m.a(x).unflatten(1, (2, 4)).unbind(1)
        return first * second

    return Lambda(run, a=conv(c, 8)), 4


def _rolled(c: int) -> Built:
    return Lambda(lambda m, x: m.a(x).roll(3, 1) + m.a(x).flip(1), a=conv(c, 6)), 6


def _repeated(c: int) -> Built:
    return Lambda(lambda m, x: m.a(x).repeat(1, 2, 1, 1), a=conv(c, 4)), 8


def _pixel_shuffle(c: int) -> Built:
    return nn.Sequential(conv(c, 16), nn.PixelShuffle(2), nn.AvgPool2d(2)), 4


def _pixel_unshuffle(c: int) -> Built:
    return Lambda(
        lambda m, x: F.interpolate(m.b(F.pixel_unshuffle(m.a(x), 2)), scale_factor=2), a=conv(c, 4), b=conv(16, 8)
    ), 8


def _depthwise(c: int) -> Built:
    return nn.Sequential(conv(c, 6), conv(6, 12, groups=6), nn.BatchNorm2d(12, affine=False), conv(12, 8, 1)), 8


def _grouped(c: int) -> Built:
    return nn.Sequential(conv(c, 8), conv(8, 12, groups=4), nn.LeakyReLU(0.2)), 12


def _transposed(c: int) -> Built:
    return nn.Sequential(nn.ConvTranspose2d(c, 8, 2, stride=2), nn.PReLU(8), nn.MaxPool2d(2)), 8


def _transposed_depthwise(c: int) -> Built:
    return nn.Sequential(conv(c, 8), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), nn.AvgPool2d(2)), 8


def _transposed_grouped(c: int) -> Built:
    return nn.Sequential(conv(c, 8), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.AvgPool2d(2)), 8


def _one_slope(c: int) -> Built:
    return nn.Sequential(conv(c, 6), nn.PReLU(), nn.MaxPool2d(3, stride=1, padding=1)), 6


def _pooled_indices(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        y, at = F.max_pool2d(m.a(x), 2, return_indices=True)
        return F.interpolate(y + at / 64, size=(SIZE, SIZE), mode="bilinear", align_corners=False)

    return Lambda(run, a=conv(c, 8)), 8


def _squeeze_excite(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        y = m.a(x)
        return y * m.c(F.relu(m.b(F.adaptive_avg_pool2d(y, 1)))).sigmoid()

    return Lambda(run, a=conv(c, 8), b=conv(8, 4, 1), c=conv(4, 8, 1)), 8


def _mean_gate(c: int) -> Built:
    return Lambda(lambda m, x: m.a(x) * m.b(m.a(x).mean((2, 3)))[..., None, None], a=conv(c, 8), b=nn.Linear(8, 8)), 8


def _spatial_gate(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        y = m.a(x)
        gates = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True), m.c(x)], 1)
        return y * torch.sigmoid(m.b(gates))

    return Lambda(run, a=conv(c, 8), b=conv(3, 1), c=conv(c, 1)), 8


def _outer_sum(c: int) -> Built:
    """Two values that broadcast over each other's channels."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        rows, columns = m.a(x).mean((2, 3)), m.b(x).mean((2, 3))
        return F.adaptive_avg_pool2d(m.c((rows[:, :, None] + columns[:, None, :])[:, None]), SIZE)

    return Lambda(run, a=conv(c, 4), b=conv(c, 6), c=conv(1, 6)), 6


def _padded(c: int) -> Built:
    return Lambda(
        lambda m, x: F.pad(F.pad(m.a(x), (1, 0, 2, 0), value=3.0), (0, 1, 0, 0), mode="reflect")[:, :, 2:, 1:-1],
        a=conv(c, 8),
    ), 8


def _channel_pad(c: int) -> Built:
    return Lambda(lambda m, x: F.pad(m.a(x), (0, 0, 0, 0, 1, 2)), a=conv(c, 5)), 8


def _spatial_softmax(c: int) -> Built:
    return Lambda(lambda m, x: m.a(x).flatten(2).softmax(-1).view(x.shape[0], -1, SIZE, SIZE), a=conv(c, 8)), 8


def _channel_softmax(c: int) -> Built:
    return nn.Sequential(conv(c, 6), nn.Softmax(dim=1)), 6


def _attention(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        t = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        q, k, v = m.qkv(m.norm(t)).chunk(3, -1)
        t = t + m.out((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v)
        t = t + m.down(F.gelu(m.up(t)))
        return F.interpolate(t.transpose(1, 2).reshape(x.shape[0], -1, SIZE // 2, SIZE // 2), scale_factor=2.0)

    return Lambda(
        run, qkv=nn.Linear(c, 24), out=nn.Linear(8, c), norm=nn.LayerNorm(c), up=nn.Linear(c, 10), down=nn.Linear(10, c)
    ), c


def _fused_attention(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        t = m.a(x).flatten(2).transpose(1, 2)
        t = m.mha(t, t, t, need_weights=False)[0] + F.scaled_dot_product_attention(t, t, t)
        return m.b(t.transpose(1, 2).reshape(x.shape[0], 8, SIZE, SIZE))

    return Lambda(run, a=conv(c, 8), mha=nn.MultiheadAttention(8, 2, batch_first=True), b=conv(8, 8, 1)), 8


def _tokens(c: int) -> Built:
    """A class token, a position embedding by number and one by value, a layer scale."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        t = m.a(x).flatten(2).mT
        t = torch.cat([m.token.expand(x.shape[0], -1, -1), t], 1) + m.position
        t = t + m.embed(torch.arange(t.shape[1]))
        t = t + m.scale * m.mlp(t)
        return t[:, 1:].mT.unflatten(2, (SIZE, SIZE)) + t[:, 0, :, None, None]

    count = SIZE * SIZE + 1
    mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    return Lambda(
        run,
        a=conv(c, 8),
        token=parameter(1, 1, 8),
        position=parameter(1, count, 8),
        scale=parameter(8),
        embed=nn.Embedding(count, 8),
        mlp=mlp,
    ), 8


def _norms(c: int) -> Built:
    return nn.Sequential(
        conv(c, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 8), nn.GroupNorm(2, 8), nn.SiLU(True)
    ), 8


def _twice(c: int) -> Built:
    return Lambda(lambda m, x: m.b(F.relu(m.b(m.a(x)))), a=conv(c, 6), b=conv(6, 6)), 6


def _tied(c: int) -> Built:
    first, second = conv(c, 8), conv(c, 8)
    second.weight = first.weight
    return Lambda(lambda m, x: m.a(x) - m.b(x).relu(), a=first, b=second), 8


def _tied_across(c: int) -> Built:
    """The same matrix writes channels in one place and reads them in another."""
    return Lambda(
        lambda m, x: m.b(F.linear(m.a(x).permute(0, 2, 3, 1), m.w).relu() @ m.w).permute(0, 3, 1, 2),
        a=conv(c, 6),
        w=parameter(10, 6),
        b=nn.Linear(6, 6),
    ), 6


def _layer_scale(c: int) -> Built:
    return Lambda(
        lambda m, x: m.a(x) * m.scale + m.one * x.mean(1, keepdim=True) - m.shift,
        a=conv(c, 8),
        scale=parameter(8, 1, 1),
        one=parameter(1),
        shift=parameter(1, 8, SIZE, SIZE),
    ), 8


def _indexed(c: int) -> Built:
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    return Lambda(lambda m, x: m.a(x)[:, order] + m.a(x).index_select(1, order), a=conv(c, 6)), 6


def _overwritten(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :2] = m.b(x)
        y[:, 3] *= 2
        return y

    return Lambda(run, a=conv(c, 6), b=conv(c, 2)), 6


def _statistics(c: int) -> Built:
    def run(m: Lambda, x: Tensor) -> Tensor:
        y = m.a(x)
        y = (y - y.mean((-1, -2), keepdim=True)) / (y.var((2, 3), keepdim=True) + 1).sqrt()
        y = torch.where(y > 0, y, 0.1 * y) + y.cumsum(-1) * 0.1
        return torch.maximum(y, m.b(x)) + 2 ** y.clamp(-1, 1)

    return Lambda(run, a=conv(c, 8), b=conv(c, 8)), 8


def _across(c: int) -> Built:
    """Operators that mix channels."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        y = F.glu(m.a(x), 1)
        best = y.topk(2, dim=1).values
        return torch.cat([best, y.cumsum(1), y.argmax(1, keepdim=True).to(y.dtype), F.normalize(y, dim=1)], 1)

    return Lambda(run, a=conv(c, 8)), 11


def _einsum(c: int) -> Built:
    return Lambda(lambda m, x: torch.einsum("nchw,cd->ndhw", m.a(x), m.w), a=conv(c, 6), w=parameter(6, 8)), 8


def _recurrent(c: int) -> Built:
    return Lambda(
        lambda m, x: m.gru(m.a(x).mean(3).mT)[0].mT[..., None].expand(-1, -1, -1, SIZE),
        a=conv(c, 6),
        gru=nn.GRU(6, 5, batch_first=True),
    ), 5


def _cast(c: int) -> Built:
    return Lambda(lambda m, x: m.b(m.a(x).float().contiguous()), a=conv(c, 6), b=conv(6, 6)), 6


def _held_constant(c: int) -> Built:
    """A tensor that is neither parameter nor buffer: nothing tied to it can go."""
    scale = torch.linspace(0.5, 2, 6)[:, None, None]
    return Lambda(lambda m, x: m.a(x) * scale.to(x.dtype), a=conv(c, 6)), 6


BLOCKS: Mapping[str, Callable[[int], Built]] = {
    name.removeprefix("_"): block
    for name, block in list(globals().items())
    if name.startswith("_") and getattr(block, "__annotations__", {}).get("return") == Built
}

LITERAL = {
    "split_unevenly",
    "split",
    "halves",
    "gate_by_one",
    "literal_view",
    "unbound",
    "fused_attention",
    "rolled",
}
"""Blocks whose code picks channels by number or fixes how many there are."""


class Head(nn.Module):
    """Blocks, then an answer in one of four forms."""

    def __init__(self, blocks: Iterable[str], channels: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.blocks, channels = chain(blocks, channels)
        if form == "dense":
            self.answer: nn.Module = conv(channels, 2, 1)
        elif form == "flat":  # as MTCNN does it: a permutation before the flatten
            self.answer = nn.Linear(channels * (SIZE // 4) ** 2, 3)
        else:
            self.answer = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.form == "dense":
            return self.answer(x)
        if self.form == "flat":
            return self.answer(F.max_pool2d(x, 4).permute(0, 3, 2, 1).flatten(1))
        return self.answer(x.mean((2, 3))).softmax(1)


def chain(blocks: Iterable[str], channels: int) -> tuple[nn.Sequential, int]:
    layers = []
    for name in blocks:
        layer, channels = BLOCKS[name](channels)
        layers.append(layer)
    return nn.Sequential(*layers), channels


@dataclass(frozen=True)
class Spec:
    """What a composed network is made of; `output` is how forward returns its answers."""

    trunk: tuple[str, ...]
    heads: tuple[tuple[str, ...], ...]
    form: str = "dense"
    output: str = "dict"
    batch: int = 1
    seed: int = 0


class Composed(nn.Module):
    """A trunk and heads; "tensor": all tasks in one fused layer; "nested": one task's answer feeds the next one's."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = conv(3, 8)
        self.trunk, channels = chain(spec.trunk, 8)
        if spec.output == "tensor":
            self.fused, channels = chain(spec.heads[0], channels)
            self.answer = conv(channels, 2 * len(spec.heads), 1)
        else:
            self.heads = nn.ModuleList(Head(blocks, channels, spec.form) for blocks in spec.heads)

    def forward(self, x: Tensor) -> object:
        x = self.trunk(self.stem(x))
        if self.spec.output == "tensor":
            return self.answer(self.fused(x))
        answers = [head(x) for head in self.heads]
        if self.spec.output == "nested":
            answers[1:] = [later + earlier.mean() for earlier, later in pairwise(answers)]
        if self.spec.output == "dict":
            return {f"out{k}": answer for k, answer in enumerate(answers)}
        return answers if self.spec.output == "list" else tuple(answers)


class Toy:
    """The workload of a composed network: one task for each head, no data."""

    normalisation = "none"

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        names = range(len(spec.heads))
        if spec.output == "tensor":
            self.tasks = tuple(Task(f"t{k}", channels=(2 * k, 2 * k + 2)) for k in names)
        else:
            self.tasks = tuple(Task(f"t{k}", output=f"out{k}" if spec.output == "dict" else k) for k in names)

    def build(self) -> nn.Module:
        return Composed(self.spec)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.spec.batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(self.spec.seed)),)

    def batches(self, split: Split, seed: int) -> Iterable[Batch]:
        return [Batch(self.example_inputs())]

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {}

    def metrics(self) -> Mapping[str, Metric]:
        return {}


def build(spec: Spec) -> MultiTaskModel:
    """A composed network whose every parameter and statistic is random, so that no two channels are alike."""
    toy = Toy(spec)
    torch.manual_seed(spec.seed)
    return scrambled(MultiTaskModel(toy.build().eval(), toy.tasks, toy.example_inputs()), spec.seed)


def scrambled(model: MultiTaskModel, seed: int = 0) -> MultiTaskModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.module.state_dict().items():
            if value.is_floating_point():
                fan = max(1, value[0].numel()) if value.dim() > 1 else 4
                value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
    return model


def of(module: nn.Module, *inputs: Tensor, tasks: int = 1) -> MultiTaskModel:
    """A model of a hand-written module whose forward returns one answer for each task."""
    answers = tuple(Task(f"t{k}", output=k) for k in range(tasks))
    return scrambled(MultiTaskModel(module.eval(), answers, inputs))
