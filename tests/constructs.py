"""One small network for each way in which code treats channels, between layers that a cut may narrow."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import Lambda, conv, parameter

Made = tuple[nn.Module, tuple[Tensor, ...]]


class Attention(nn.Module):
    """Self- or cross-attention with separate projections; sizes in attributes, as code usually has them."""

    def __init__(self, width: int, heads: int, each: int, how: str, context: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner, self.how = heads, each, heads * each, how
        self.scale = each**-0.5
        self.q = nn.Linear(width, self.inner)
        self.k, self.v = (nn.Linear(context or width, self.inner) for _ in range(2))
        self.proj = nn.Linear(self.inner, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            part.reshape(part.shape[0], -1, self.num_heads, self.head_dim)
            for part in (self.q(x), self.k(context), self.v(context))
        )
        if self.how == "einsum":
            scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scale
            y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            if self.how == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v)
            elif self.how == "linear":
                y = (q.softmax(-1) @ (k.softmax(-2).mT @ v))
            else:
                hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
                y = (q @ k.mT * self.scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v
            y = y.transpose(1, 2)
        return self.proj(y.reshape(y.shape[0], -1, self.inner))


class FusedAttention(nn.Module):
    """Queries, keys and values from one layer, normed within a head, with a bias by relative position and a scale."""

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)
        self.norm, self.table, self.scale = nn.LayerNorm(each), parameter(9, heads), parameter(heads, 1, 1)
        self.register_buffer("position", torch.arange(5)[:, None] - torch.arange(5) + 4)

    def forward(self, x: Tensor) -> Tensor:
        n, count, _ = x.shape
        y = self.qkv(x)
        parts = y.reshape(n, count, 3, self.num_heads, y.shape[-1] // 3 // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.position.view(-1)].view(count, count, -1).permute(2, 0, 1)
        scores = self.scale * (self.norm(q) @ self.norm(k).transpose(-2, -1)) + bias
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class SharedKeys(nn.Module):
    """Grouped queries: two heads of them for each head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kept = 4, 2
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], heads, 3).transpose(1, 2)
            for layer, heads in ((self.q, self.heads), (self.k, self.kept), (self.v, self.kept))
        )
        k, v = (part.repeat_interleave(self.heads // self.kept, 1) for part in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _picture(run: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> Made:
    return Lambda(run, **layers), (torch.randn(2, 3, 8, 8),)


def _tokens(run: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> Made:
    return Lambda(run, stem=nn.Linear(6, 8), head=nn.Linear(8, 2), **layers), (torch.randn(2, 5, 6),)


def _between(block: nn.Module, into: int, out: int) -> Made:
    return nn.Sequential(conv(3, into), block, nn.ReLU(), conv(out, 2)), (torch.randn(2, 3, 8, 8),)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _resnext() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.c(m.b(m.a(x).relu()).relu()))

    return _picture(run, stem=conv(3, 8), a=conv(8, 16, 1), b=conv(16, 16, groups=8), c=conv(16, 8, 1), head=conv(8, 2))


def _shufflenet() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = _shuffled(m.a(x).relu(), 2)
        return m.head(x + m.c(m.b(y)))

    return _picture(
        run, stem=conv(3, 16), a=conv(16, 8, 1, groups=2), b=conv(8, 8, groups=8), c=conv(8, 16, 1, groups=2),
        head=conv(16, 2),
    )


def _shufflenet_v2() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        left, right = m.stem(x).chunk(2, 1)
        return m.head(_shuffled(torch.cat([left, m.c(m.b(m.a(right)))], 1), 2))

    return _picture(run, stem=conv(3, 8), a=conv(4, 4, 1), b=conv(4, 4, groups=4), c=conv(4, 4, 1), head=conv(8, 2))


def _inverted_residual() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = F.relu6(m.dn(m.dw(F.relu6(m.un(m.up(x))))))
        y = y * m.ex(m.sq(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head(x + m.pn(m.down(y)))

    return _picture(
        run, stem=conv(3, 4), up=conv(4, 12, 1), un=nn.BatchNorm2d(12), dw=conv(12, 12, groups=12),
        dn=nn.BatchNorm2d(12), sq=conv(12, 3, 1), ex=conv(3, 12, 1), down=conv(12, 4, 1), pn=nn.BatchNorm2d(4),
        head=conv(4, 2),
    )


class Normed(nn.Module):
    """A layer norm of channels first, written by hand, that keeps its shape as ConvNeXt's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.normalized_shape = parameter(width), parameter(width), (width,)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        x = self.weight[:, None, None] * x + self.bias[:, None, None]
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias).movedim(-1, 1)


class ScaledByHand(nn.LayerNorm):
    """A layer norm of channels first whose scales have a shape of their own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False)
        self.weight = parameter(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape).movedim(-1, 1) * self.weight


def _convnext() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.dw(x).permute(0, 2, 3, 1)
        y = m.gamma * m.down(F.gelu(m.up(m.norm(y))))
        return m.head(x + y.permute(0, 3, 1, 2))

    return _picture(
        run, stem=conv(3, 6), dw=conv(6, 6, groups=6), norm=nn.LayerNorm(6), up=nn.Linear(6, 12),
        down=nn.Linear(12, 6), gamma=parameter(6), head=conv(6, 2),
    )


def _dense_net() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.cat([x, m.a(x).relu()], 1)
        x = torch.cat([x, m.b(x).relu()], 1)
        return m.head(x)

    return _picture(run, stem=conv(3, 4), a=conv(4, 3), b=conv(7, 5), head=conv(12, 2))


def _unet_of_group_norms() -> Made:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.norm(m.stem(x)).relu()
        return m.head(torch.cat([x, F.interpolate(m.up(F.avg_pool2d(x, 2)), scale_factor=2)], 1))

    return _picture(run, stem=conv(3, 8), norm=nn.GroupNorm(4, 8), up=conv(8, 6), head=conv(14, 2))


def _stages() -> Made:
    """A residual chain, then a second one behind a strided projection."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = (x + m.b(m.a(x).relu())).relu()
        x = (x + m.d(m.c(x).relu())).relu()
        x = (m.skip(x) + m.f(m.e(x).relu())).relu()
        return m.head(x + m.h(m.g(x).relu()))

    return _picture(
        run, stem=conv(3, 6), a=conv(6, 4), b=conv(4, 6), c=conv(6, 4), d=conv(4, 6), skip=conv(6, 8, 1, stride=2),
        e=conv(6, 8, stride=2), f=conv(8, 8), g=conv(8, 5), h=conv(5, 8), head=conv(8, 2),
    )


def _two_inputs() -> Made:
    def run(m: Lambda, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = m.a(x[0]) * m.b(x[1])[..., None, None]
        return m.c(y), m.d(y.mean((2, 3)))

    class Two(Lambda):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.run(self, (x, y))

    layers = {"a": conv(3, 6), "b": nn.Linear(4, 6), "c": conv(6, 2), "d": nn.Linear(6, 3)}
    return Two(run, **layers), (torch.randn(2, 3, 8, 8), torch.randn(2, 4))  # type: ignore[arg-type]


def _cross_attention() -> Made:
    class Cross(Lambda):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            x = self.stem(x)
            return self.head(x + self.mix(x, self.other(y)))

    layers = {
        "stem": nn.Linear(6, 8), "other": nn.Linear(3, 7), "mix": Attention(8, 4, 3, "sdpa", 7), "head": nn.Linear(8, 2)
    }
    return Cross(lambda m, x: x, **layers), (torch.randn(2, 5, 6), torch.randn(2, 4, 3))


def _attended(how: str) -> Callable[[], Made]:
    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.mix(x))

    return lambda: _tokens(run, mix=Attention(8, 4, 3, how))


def _side_by_side(m: Lambda, x: Tensor) -> Tensor:
    y = torch.cat([m.a(x).flatten(2), m.b(x).flatten(2)], 2).relu()
    return m.c(y[..., :64]) - m.d(y[..., 64:])


def _one_head(m: Lambda, x: Tensor) -> Tensor:
    x = m.stem(x)
    scores = (m.q(x) @ m.k(x).mT / 3).softmax(-1)
    return m.head(x + m.o(scores @ m.v(x)))


def _one_head_scaled_by_its_width(m: Lambda, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(x + m.o(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))))


def _one_head_chunked(m: Lambda, x: Tensor) -> Tensor:
    x = m.stem(x)
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.head(x + m.o((q @ k.mT / 3).softmax(-1) @ v))


def _experts(mix: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[[], Made]:
    """Two experts, weighed by a gate."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        each = [m.a2(m.a(x).relu()), m.b2(m.b(x).relu())]
        return m.head(mix(each, m.gate(x).softmax(-1)).relu())

    layers = {
        "a": nn.Linear(5, 6), "a2": nn.Linear(6, 4), "b": nn.Linear(5, 7), "b2": nn.Linear(7, 4),
        "gate": nn.Linear(5, 2), "head": nn.Linear(4, 2),
    }  # fmt: skip
    return lambda: (Lambda(run, **layers), (torch.randn(3, 5),))


def _tensors_of_experts(mix: Callable[[Lambda, Tensor], Tensor]) -> Callable[[], Made]:
    """Four experts of two layers each, whose weights are two parameters; `mix` answers (sample, expert, channel)."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        best, chosen = m.gate(x).softmax(-1).topk(2, -1)
        gate = x.new_zeros(3, 4).scatter(-1, chosen, best)
        return m.head(x + (mix(m, x) * gate[..., None]).sum(1))

    layers = {"stem": nn.Linear(5, 6), "gate": nn.Linear(6, 4), "head": nn.Linear(6, 2)}
    return lambda: (Lambda(run, **layers, up=parameter(4, 6, 8), down=parameter(4, 8, 6)), (torch.randn(3, 5),))


def _interactions(m: Lambda, x: Tensor) -> Tensor:
    each = torch.stack([m.a(x), m.b(x), m.c(x)], 1)
    return m.head((each @ each.mT).flatten(1))


def _two_uses(m: Lambda, x: Tensor) -> Tensor:
    x = F.conv2d(m.a(x), m.w, padding=1).relu()
    return m.b(F.conv2d(x, m.w, padding=1))


def _outside_autocast(m: Lambda, x: Tensor) -> Tensor:
    x = m.a(x)
    with torch.autocast("cpu", enabled=False):
        y = m.b(x.float()).relu()
    return m.c(y + x)


def _halves(m: Lambda, x: Tensor) -> Tensor:
    x = m.a(x)
    half = x.shape[1] // 2
    return m.b(x[:, :half]) + m.c(x[:, half:])


CONSTRUCTS: Mapping[str, Callable[[], Made]] = {
    "many groups": lambda: _between(conv(12, 24, groups=6), 12, 24),
    "few groups": lambda: _between(conv(12, 18, groups=2), 12, 18),
    "transposed, many groups": lambda: _between(nn.ConvTranspose2d(12, 18, 2, groups=6), 12, 18),
    "transposed, few groups": lambda: _between(nn.ConvTranspose2d(12, 8, 2, groups=2), 12, 8),
    "resnext": _resnext,
    "shufflenet": _shufflenet,
    "shufflenet v2": _shufflenet_v2,
    "inverted residual": _inverted_residual,
    "convnext": _convnext,
    "dense net": _dense_net,
    "stages": _stages,
    "group norm": _unet_of_group_norms,
    "one group's norm": lambda: _between(nn.GroupNorm(1, 6), 6, 6),
    "norm of an input": lambda: _picture(
        lambda m, x: m.b(m.a((x - x.mean(1, keepdim=True)) / x.std()).relu()), a=conv(3, 6), b=conv(6, 2)
    ),
    "norm without weights": lambda: _tokens(
        lambda m, x: m.head(m.norm(m.stem(x)).relu()), norm=nn.LayerNorm(8, elementwise_affine=False)
    ),
    "norm scaled by hand": lambda: _picture(
        lambda m, x: m.b(m.a(m.norm(x)).relu()), norm=ScaledByHand(3), a=conv(3, 6), b=conv(6, 2)
    ),
    "mean as a gate": lambda: _picture(
        lambda m, x: m.b(m.a(x) * m.gate(x).relu().mean(1, keepdim=True)), a=conv(3, 6), gate=conv(3, 5), b=conv(6, 2)
    ),
    "one token of its own": lambda: _tokens(
        lambda m, x: m.head(torch.cat([m.first.expand(len(x), -1, -1), m.stem(x)], 1) * m.scale + m.position),
        first=parameter(1, 1, 8), scale=parameter(8), position=parameter(1, 6, 8),
    ),
    "norms by hand": lambda: _between(Normed(6), 6, 6),
    "root mean square": lambda: _tokens(lambda m, x: m.head(m.norm(m.stem(x)).relu()), norm=nn.RMSNorm(8)),
    "norm of each head": lambda: _tokens(
        lambda m, x: m.head(m.norm(m.stem(x).unflatten(2, (-1, 4))).flatten(2)), norm=nn.LayerNorm(4)
    ),
    "channel shuffle": lambda: _between(nn.ChannelShuffle(2), 8, 8),
    "pixel shuffle": lambda: _between(nn.PixelShuffle(2), 16, 4),
    "glu": lambda: _between(nn.GLU(1), 8, 4),
    "gated by chunk": lambda: _picture(
        lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, 1)).relu()), a=conv(3, 8), b=conv(4, 2)
    ),
    "swapped chunks": lambda: _picture(
        lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=conv(3, 8), b=conv(8, 2)
    ),
    "uneven split": lambda: _picture(
        lambda m, x: torch.cat([m.b(part) for part in m.a(x).split([4, 2], 1)[:1]], 1), a=conv(3, 6), b=conv(4, 2)
    ),
    "side by side": lambda: _picture(
        _side_by_side, a=conv(3, 6), b=conv(3, 6), c=nn.Conv1d(6, 2, 1), d=nn.Conv1d(6, 2, 1)
    ),
    "called twice": lambda: _picture(
        lambda m, x: m.c(m.b(m.b(m.a(x)).relu())), a=conv(3, 6), b=conv(6, 6), c=conv(6, 2)
    ),
    "weight used twice": lambda: _picture(_two_uses, a=conv(3, 6), w=parameter(6, 6, 3, 3), b=conv(6, 2)),
    "flatten after permute": lambda: _picture(
        lambda m, x: m.b(m.a(x).permute(0, 3, 2, 1).flatten(1)), a=conv(3, 6), b=nn.Linear(384, 2)
    ),
    "raw parameters": lambda: _picture(
        lambda m, x: m.b((m.a(x) * m.scale[:, None, None] + m.shift).relu()), a=conv(3, 6), scale=parameter(6),
        shift=parameter(1, 6, 8, 8), b=conv(6, 2),
    ),
    "matrix": lambda: _picture(
        lambda m, x: m.b((m.a(x).mean((2, 3)) @ m.w).relu()), a=conv(3, 6), w=parameter(6, 10), b=nn.Linear(10, 2)
    ),
    "einsum with a matrix": lambda: _picture(
        lambda m, x: m.b(torch.einsum("nchw,cd->ndhw", m.a(x), m.w)), a=conv(3, 6), w=parameter(6, 8), b=conv(8, 2)
    ),
    "matrix from the left": lambda: _picture(
        lambda m, x: m.b((m.w @ m.a(x).flatten(2)).relu().mean(2)), a=conv(3, 6), w=parameter(10, 6), b=nn.Linear(10, 2)
    ),
    "graph": lambda: _tokens(lambda m, x: m.head((m.edges @ m.stem(x)).relu()), edges=parameter(5, 5)),
    "largest of all positions": lambda: _picture(
        lambda m, x: m.b(m.a(x).flatten(2).max(2)[0]), a=conv(3, 6), b=nn.Linear(6, 2)
    ),
    "larger of two": lambda: _picture(
        lambda m, x: m.c(torch.max(m.a(x), m.b(x))), a=conv(3, 6), b=conv(3, 6), c=conv(6, 2)
    ),
    "two towers": lambda: (
        Lambda(lambda m, x: (m.a(x) * m.b(x)).sum(1, keepdim=True) + m.c(x), a=nn.Linear(5, 6), b=nn.Linear(5, 6),
               c=nn.Linear(5, 1)),
        (torch.randn(3, 5),),
    ),
    "scale by a function": lambda: _picture(
        lambda m, x: m.b((m.a(x) * m.scale.exp()[:, None, None]).relu()), a=conv(3, 6), scale=parameter(6), b=conv(6, 2)
    ),
    "scale of two parameters": lambda: _picture(
        lambda m, x: m.b(m.a(x) * (m.scale * (m.spread + 1).rsqrt())[:, None, None]), a=conv(3, 6), scale=parameter(6),
        spread=nn.Parameter(torch.rand(6)), b=conv(6, 2),
    ),
    "heads, weighed and summed": lambda: _picture(
        lambda m, x: m.b((m.a(x).unflatten(1, (-1, 4)) * m.c(x).unflatten(1, (-1, 4))).sum(2)), a=conv(3, 12),
        c=conv(3, 12), b=conv(3, 2),
    ),
    "rows mixed": lambda: _picture(lambda m, x: m.b(m.mix @ m.a(x)), a=conv(3, 6), mix=parameter(8, 8), b=conv(6, 2)),
    "sampled": lambda: _picture(
        lambda m, x: m.b(F.grid_sample(m.a(x), m.at(x).permute(0, 2, 3, 1).tanh(), align_corners=False)),
        a=conv(3, 6), at=conv(3, 2), b=conv(6, 2),
    ),
    "halves by slices": lambda: _picture(_halves, a=conv(3, 8), b=conv(4, 2), c=conv(4, 2)),
    "outside autocast": lambda: _picture(_outside_autocast, a=conv(3, 6), b=conv(6, 6), c=conv(6, 2)),
    "two inputs and outputs": _two_inputs,
    "token mlp": lambda: _tokens(
        lambda m, x: m.head(m.stem(x) + m.down(F.gelu(m.up(m.norm(m.stem(x)))))), norm=nn.LayerNorm(8),
        up=nn.Linear(8, 12), down=nn.Linear(12, 8),
    ),
    "positions and words": lambda: (
        Lambda(
            lambda m, x: m.head((m.words(x) + m.position).relu().mean(1)), words=nn.Embedding(9, 6),
            position=parameter(1, 5, 6), head=nn.Linear(6, 2),
        ),
        (torch.randint(0, 9, (2, 5)),),
    ),
    **{f"attention, {how}": _attended(how) for how in ("matmul", "sdpa", "einsum", "linear")},
    "grouped queries": lambda: _tokens(lambda m, x: m.head(m.mix(m.stem(x))), mix=SharedKeys()),
    "cross-attention": _cross_attention,
    "attention from one layer": lambda: _tokens(
        lambda m, x: m.head(m.stem(x) + m.mix(m.stem(x))), mix=FusedAttention(8, 4, 3)
    ),
    "one head": lambda: _tokens(
        _one_head, q=nn.Linear(8, 6), k=nn.Linear(8, 6), v=nn.Linear(8, 10), o=nn.Linear(10, 8)
    ),
    "one head, scaled by its width": lambda: _tokens(
        _one_head_scaled_by_its_width, q=nn.Linear(8, 6), k=nn.Linear(8, 6), v=nn.Linear(8, 10), o=nn.Linear(10, 8)
    ),
    "one head by chunk": lambda: _tokens(_one_head_chunked, qkv=nn.Linear(8, 18), o=nn.Linear(6, 8)),
    "multi-head module": lambda: _tokens(
        lambda m, x: m.head(m.mix(*[m.stem(x)] * 3)[0]), mix=nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "transformer layer": lambda: _tokens(
        lambda m, x: m.head(m.mix(m.stem(x))), mix=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    ),
    "recurrent": lambda: _tokens(lambda m, x: m.head(m.mix(m.stem(x))[0]), mix=nn.GRU(8, 8, batch_first=True)),
    "experts, each weighed": _experts(lambda each, gate: (torch.stack(each, 1) * gate[..., None]).sum(1)),
    "experts, batched": _experts(lambda each, gate: (torch.stack(each, 2) @ gate[..., None]).squeeze(2)),
    "experts by einsum": _experts(lambda each, gate: torch.einsum("enc,ne->nc", torch.stack(each), gate)),
    "experts in one tensor, by einsum": _tensors_of_experts(
        lambda m, x: torch.einsum("beh,ehd->bed", torch.einsum("bd,edh->beh", x, m.up).relu(), m.down)
    ),
    "experts in one tensor, by matmul": _tensors_of_experts(
        lambda m, x: ((x @ m.up).relu() @ m.down).transpose(0, 1)
    ),
    "interactions": lambda: (
        Lambda(_interactions, a=nn.Linear(5, 4), b=nn.Linear(5, 4), c=nn.Linear(5, 4), head=nn.Linear(9, 2)),
        (torch.randn(3, 5),),
    ),
    "gram matrix": lambda: _picture(
        lambda m, x: m.b((lambda y: y @ y.mT)(m.a(x).flatten(2)).flatten(1)), a=conv(3, 5), b=nn.Linear(25, 2)
    ),
}  # fmt: skip
