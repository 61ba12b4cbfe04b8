"""What the analysis says of single operators: which channels belong together, which must stay, what they cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.channels import FIXED, Axis, ChannelMap, analyse
from compressor.groups import Prunable
from compressor.ids import Classes, compact, spread, whole
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.trace import trace
from tests.models import Lambda, conv, of


def analysed(module: nn.Module, *inputs: Tensor) -> ChannelMap:
    model = of(module, *inputs)
    return analyse(trace(single(model)), model.module.state_dict())


def single(model: MultiTaskModel) -> MultiTaskModel:
    """A forward that returns a tensor has one task."""
    model.tasks = model.tasks[:1]
    return model


def free(found: ChannelMap, tensor: str, dim: int = 0) -> int:
    """How many channels of an axis can go."""
    return int((found.axes[Axis(tensor, dim)] != FIXED).sum())


def between(run: Callable[[Tensor], Tensor], channels: int = 8) -> ChannelMap:
    """An operator between two convolutions `a` and `b`."""
    with torch.no_grad():
        width = run(torch.randn(2, channels, 8, 8)).shape[1]
    return analysed(
        Lambda(lambda m, x: m.b(run(m.a(x))), a=conv(3, channels), b=conv(width, 2)), torch.randn(2, 3, 8, 8)
    )


# --- ids


def test_fixed_absorbs_whatever_is_merged_with_it() -> None:
    classes = Classes()
    ids = classes.fresh(4)
    classes.merge(ids[:2], ids[2:])
    classes.fix(ids[2])
    assert classes.root(ids).tolist() == [FIXED, 2, FIXED, 2]


def test_repeated_ids_take_no_memory() -> None:
    classes = Classes()
    ids = spread(classes.fresh(4), (1, 4, 1000, 1000), 1)
    assert classes.root(ids).untyped_storage().nbytes() == 4 * 8
    assert compact(ids.contiguous()).untyped_storage().nbytes() == 4 * 8
    assert whole((10**4, 10**4)).untyped_storage().nbytes() == 8


def test_channels_of_an_empty_tensor() -> None:
    classes = Classes()
    assert classes.tie(torch.zeros(3, 0, dtype=torch.int64), 0).tolist() == [FIXED] * 3
    assert classes.along(torch.zeros(0, 3, dtype=torch.int64), 1) is not None


# --- operators that keep channels apart


@pytest.mark.parametrize(
    "run",
    [
        lambda y: y[:, ::2] + y[:, 1::2],
        lambda y: y[:, -3:],
        lambda y: y.flip(-3),
        lambda y: y.permute(0, 2, 3, 1).reshape(2, 64, 8).mT.unflatten(-1, (8, 8)),
        lambda y: torch.narrow(input=y, start=1, length=4, dim=1),
        lambda y: torch.mean(input=y, keepdim=True, dim=(-1, 2)) * y,
        lambda y: y / y.std((-2, -1), keepdim=True),
        lambda y: y.cumsum(dim=-1),
        lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
        lambda y: F.interpolate(y, scale_factor=1.5, mode="bicubic"),
        lambda y: F.interpolate(y, size=(5, 5)),
        lambda y: F.adaptive_max_pool2d(y, 3),
        lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
        lambda y: F.pad(y, (1, 1, 1, 1), mode="circular"),
        lambda y: 2 - y.clamp(min=0).pow(2) / 3,
        lambda y: 2**y,
        lambda y: torch.where(y > 0, y, -y),
        lambda y: torch.addcmul(y, y, y),
        lambda y: y.clone().relu_().mul_(2),
        lambda y: y.unsqueeze(1).squeeze(1),
        lambda y: torch.stack(y.unbind(1), -1).movedim(-1, 1),
        lambda y: y.argmax(2, keepdim=True).to(y.dtype) + y,
        lambda y: F.glu(y, 1),
        lambda y: F.layer_norm(y, (8, 8)),
        lambda y: F.normalize(y, dim=(2, 3)),
        lambda y: y.masked_fill(y > 0.5, 0.0),
        lambda y: F.scaled_dot_product_attention(y, y, y),
        lambda y: y @ y.mT @ y,
        lambda y: torch.einsum("nchw,nchv->ncwv", y, y),
        lambda y: torch.einsum("nchw->nwch", y).movedim(2, 1),
    ],
)
def test_channels_stay_free_through(run: Callable[[Tensor], Tensor]) -> None:
    found = between(run)
    assert free(found, "a.weight") > 0
    assert free(found, "a.weight") >= len(found.axes[Axis("b.weight", 1)].unique())
    assert not found.mixed


# --- operators that mix channels, and uses that are not understood: all stay


@pytest.mark.parametrize(
    "run",
    [
        lambda y: y.mean(1, keepdim=True) * y,
        lambda y: y.mean(keepdim=True, dim=-3) + torch.zeros(2, 8, 1, 1),
        lambda y: y.softmax(1),
        lambda y: y.cumsum(1),
        lambda y: y.var(1, keepdim=True) * y,
        lambda y: y.sum() + y,
        lambda y: y.topk(3, dim=1)[0],
        lambda y: y.sort(1).values,
        lambda y: y.argmax(1, keepdim=True).to(y.dtype) + y,
        lambda y: y[:, torch.tensor([1, 0, 3])],
        lambda y: y.gather(1, torch.zeros(2, 4, 8, 8, dtype=torch.int64)),
        lambda y: y.index_select(1, torch.tensor([5, 1])),
        lambda y: F.layer_norm(y, (8, 8, 8)),
        lambda y: F.group_norm(y, 4),
        lambda y: F.normalize(y, dim=1),
        lambda y: F.pad(y, (0, 0, 0, 0, 0, 1)),
        lambda y: F.unfold(y, 3, padding=1).unflatten(2, (8, 8)),
        lambda y: torch.einsum("nchw,ndhw->ncd", y, y)[..., None],
        lambda y: F.scaled_dot_product_attention(*[y.flatten(2).mT] * 3).mT.unflatten(2, (8, 8)),
        lambda y: torch.fft.fft(y, dim=1).real,
        lambda y: y.contiguous().view(torch.int32).to(torch.float32),
        lambda y: y.masked_fill(y > 0.5, 0.0).index_fill(1, torch.tensor([2]), 1.0),
        lambda y: y.scatter(1, torch.zeros(2, 1, 8, 8, dtype=torch.int64), 1.0),
        lambda y: y.triu(),
    ],
)  # fmt: skip
def test_channels_all_stay_through(run: Callable[[Tensor], Tensor]) -> None:
    found = between(run)
    assert free(found, "a.weight") == 0
    assert found.mixed


def test_a_gate_stays_and_what_it_gates_is_free() -> None:
    found = analysed(
        Lambda(lambda m, x: m.c(m.a(x) * m.b(x).sigmoid()), a=conv(3, 6), b=conv(3, 1), c=conv(6, 2)),
        torch.randn(1, 3, 8, 8),
    )
    assert (free(found, "a.weight"), free(found, "b.weight")) == (6, 0)


def test_two_values_that_broadcast_over_each_other_both_stay() -> None:
    found = analysed(
        Lambda(
            lambda m, x: m.c(m.a(x).mean((2, 3))[:, :, None] * m.b(x).mean((2, 3))[:, None]),
            a=conv(3, 4),
            b=conv(3, 6),
            c=nn.Conv1d(4, 2, 1),
        ),
        torch.randn(1, 3, 8, 8),
    )
    assert (free(found, "a.weight"), free(found, "b.weight")) == (0, 0)


def test_a_constant_used_twice_is_only_cut_where_both_uses_allow() -> None:
    """The same vector shifts the network's input (which stays) and a convolution's channels."""

    def run(m: Lambda, x: Tensor) -> Tensor:
        return m.b(m.a(x + m.shift[:, None, None]) + m.shift[:, None, None])

    found = analysed(
        Lambda(run, a=conv(3, 3), b=conv(3, 2), shift=nn.Parameter(torch.randn(3))), torch.randn(1, 3, 8, 8)
    )
    assert free(found, "a.weight") == 0


def test_rows_of_an_embedding_stay_even_when_tied_to_a_classifier() -> None:
    def run(m: Lambda, tokens: Tensor) -> Tensor:
        return m.out(F.linear(m.words(tokens), m.words.weight).relu())

    found = analysed(Lambda(run, words=nn.Embedding(10, 6), out=nn.Linear(10, 2)), torch.randint(0, 10, (1, 4)))
    assert (free(found, "words.weight", 0), free(found, "words.weight", 1)) == (0, 6)


def test_an_unbatched_input_is_no_channel_dimension() -> None:
    found = analysed(Lambda(lambda m, x: F.max_pool2d(m.a(x).relu(), 2), a=conv(3, 6)), torch.randn(3, 8, 8))
    assert free(found, "a.weight") == 0


def test_a_constant_that_is_no_parameter_holds_what_it_meets() -> None:
    scale = torch.linspace(1, 2, 6)[:, None, None]
    found = analysed(Lambda(lambda m, x: m.b(m.a(x) * scale), a=conv(3, 6), b=conv(6, 2)), torch.randn(1, 3, 8, 8))
    assert free(found, "a.weight") == 0


def test_a_window_over_channels_makes_them_one_class() -> None:
    found = between(lambda y: F.local_response_norm(y, 3))
    assert len(found.axes[Axis("a.weight", 0)].unique()) == 1


def test_pixel_shuffle_ties_the_channels_that_become_one() -> None:
    found = between(lambda y: F.pixel_shuffle(y, 2))
    classes = found.axes[Axis("a.weight", 0)]
    assert classes.reshape(2, 4).unique(dim=1).shape == (2, 1)
    assert len(classes.unique()) == 2


def test_depthwise_multipliers_follow_their_input() -> None:
    found = analysed(nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2)), torch.randn(1, 3, 8, 8))
    first, second = found.axes[Axis("0.weight", 0)], found.axes[Axis("1.weight", 0)]
    assert torch.equal(second, first.repeat_interleave(2))
    assert next(c for c in found.contractions if c.weight == "1.weight").reads is None


def test_held_nodes_keep_their_channels() -> None:
    model = single(of(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)), torch.randn(1, 3, 8, 8)))
    network = trace(model)
    relu = next(node.name for node in network.graph.nodes if "relu" in node.name)
    assert free(analyse(network, model.module.state_dict()), "0.weight") == 4
    assert free(analyse(network, model.module.state_dict(), [relu]), "0.weight") == 0
    assert free(analyse(network, ["2.weight", "2.bias"]), "2.weight", 1) == 0


# --- multiply-adds


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 2 * 36 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, padding="same", dilation=2), (1, 3, 6, 6), 36 * 8 * 3 * 9),
        (nn.Conv2d(4, 8, (1, 3), stride=2), (1, 4, 7, 7), 4 * 3 * 8 * 4 * 3),
        (nn.Conv2d(8, 12, 3, groups=4), (1, 8, 5, 5), 9 * 12 * 2 * 9),
        (nn.Conv2d(6, 12, 3, groups=6), (1, 6, 5, 5), 9 * 12 * 9),
        (nn.Conv1d(3, 5, 4), (2, 3, 9), 2 * 6 * 5 * 3 * 4),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3), 8 * 2 * 8),
        (nn.ConvTranspose2d(3, 5, 2, stride=2), (1, 3, 4, 4), 16 * 3 * 5 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 4, 4), 16 * 4 * 3 * 9),
        (nn.Linear(7, 5), (2, 3, 7), 6 * 7 * 5),
        (Lambda(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(7, 4))), (2, 3, 7), 6 * 7 * 4),
        (Lambda(lambda m, x: (x @ x.mT).softmax(-1) @ x), (2, 5, 7), 2 * 2 * 5 * 5 * 7),
        (Lambda(lambda m, x: F.scaled_dot_product_attention(x, x, x)), (2, 3, 5, 7), 6 * 2 * 5 * 5 * 7),
        (Lambda(lambda m, x: torch.einsum("bik,bjk->bij", x, x)), (2, 5, 7), 2 * 5 * 5 * 7),
        (Lambda(lambda m, x: torch.einsum("...ik,...jk", x, x)), (2, 5, 7), 2 * 5 * 5 * 7),
        (Lambda(lambda m, x: torch.einsum("bik->bki", x)), (2, 5, 7), 0),
        (Lambda(lambda m, x: m.gru(x)[0], gru=nn.GRU(4, 3, batch_first=True)), (2, 6, 4), 12 * 3 * 3 * (4 + 3)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 8, 8), 0),
    ],
)
def test_multiply_adds_by_hand(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    model = single(of(module, torch.randn(shape)))
    assert count_macs(trace(model)) == (macs, macs)
    prunable = Prunable.of(model)
    assert prunable.cost(prunable.keep_all()) == (macs, sum(p.numel() for p in module.parameters()))


def test_weights_that_are_zero_do_not_count_as_effective() -> None:
    model = single(of(nn.Sequential(conv(3, 8), nn.Flatten(), nn.Linear(8 * 16, 5)), torch.randn(1, 3, 4, 4)))
    with torch.no_grad():
        model.module[0].weight[:2] = 0
        model.module[2].weight[:, ::2] = 0
    assert count_macs(trace(model)) == (16 * 8 * 27 + 640, 16 * 6 * 27 + 320)
