"""Sparse convolutions: whatever the window, the density or the neighbours, the dense answer, and no write elsewhere."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from hypothesis import assume, given, settings
from hypothesis import example as example_of
from hypothesis import strategies as st
from networks import answers, cpu_device, example, host_bits, run_built, settle, to_program
from torch import Tensor, nn

from profiles.device import Device
from targets.base import Array, Program
from targets.cpu import CpuTarget
from targets.kernels.moves import group_blocks, regroup, unblock_squares, ungroup, ungroup_blocks
from targets.kernels.regions import Layout, Regions, shifts
from targets.kernels.sparse import SparseConvolution
from targets.kernels.sparse_methods import SparseLayer
from targets.kernels.window import Window
from targets.passes.channels import Channels
from targets.passes.forms import convolutions

SPARSE = import_module("targets.passes.sparse")  # the package has a function of that name
DEVICE = cpu_device(bits=host_bits())


def everything(module: tvm.IRModule, *_: object) -> dict[Any, SparseLayer]:
    return convolutions(module)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(SPARSE, "sparse_layers", everything)
    yield


def thinned(module: nn.Module, density: float, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.mul_(torch.rand(layer.weight.shape, generator=generator) < density)
    return module


def kernels(program: Program) -> set[str]:
    """Whether a program's convolutions are sparse or dense, or some each."""
    plan = CpuTarget().plan(program, DEVICE).files["model.tir"].decode()
    named = re.findall(r"def (\w*convolution)", plan)
    return {"sparse" if name.startswith("sparse") else "dense" for name in named}


class Residual(nn.Module):
    """Sparse to sparse, a sum, a stride, a shortcut, ReLU6, and two answers of which one is read on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(7, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1, bias=False)
        self.norm, self.down = nn.BatchNorm2d(20), nn.Conv2d(20, 33, 3, 2, 1)
        self.short, self.head = nn.Conv2d(20, 33, 1, 2), nn.Conv2d(33, 5, 5, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(x)) + x)
        y = nn.functional.relu6(self.down(x) + self.short(x))
        return x.mean((2, 3)), self.head(y)


@pytest.mark.parametrize("size", [(14, 14), (28, 28), (13, 9), (5, 31)])
def test_a_sparse_network_answers_as_the_dense_one(size: tuple[int, int], always: None) -> None:
    program = to_program(thinned(settle(Residual()), 0.2), (torch.zeros(1, 7, *size),), ("pooled", "map"))
    x = example(1, 7, *size)
    want, have = answers(program, x), run_built(program, DEVICE, x)
    for task in program.tasks:
        assert np.allclose(have[task], want[task], atol=1e-5 * np.abs(want[task]).max())
    assert kernels(program) == {"sparse"}


class Mixed(nn.Module):
    """Depthwise, grouped and strided convolutions, gates, a concatenation, a resize, pooling, odd channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.grouped, self.point = nn.Conv2d(20, 30, 3, 1, 2, groups=5, dilation=2), nn.Conv2d(30, 20, 1)
        self.down, self.wide = nn.Conv2d(20, 17, 3, 2, 1, groups=1), nn.Conv2d(17, 20, 5, padding=2)
        self.slim, self.last = nn.Conv2d(40, 6, (1, 3), padding=(0, 1)), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        y = self.point(nn.functional.relu6(self.grouped(self.depth(x)))) + x
        y = y * torch.relu(y - x)
        low = nn.functional.silu(self.wide(torch.relu(self.down(y))))
        high = nn.functional.interpolate(low, size=x.shape[2:], mode="nearest")
        z = self.slim(torch.cat([high, y], 1))
        return self.last(nn.functional.max_pool2d(z, 3, 1, 1)), low.mean((2, 3))


@given(seed=st.integers(0, 999), size=st.tuples(st.integers(7, 24), st.integers(7, 24)))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_choice_of_sparse_convolutions_gives_the_same_answer(seed: int, size: tuple[int, int]) -> None:
    program = to_program(thinned(settle(Mixed()), 0.4, seed), (torch.zeros(1, 3, *size),), ("map", "pooled"))
    chance = np.random.default_rng(seed)

    def some(module: tvm.IRModule, *_: object) -> dict[Any, SparseLayer]:
        return {var: layer for var, layer in convolutions(module).items() if chance.random() < 0.6}

    x = example(1, 3, *size, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SPARSE, "sparse_layers", some)
        have = run_built(program, DEVICE, x)
    for task, want in answers(program, x).items():
        assert np.allclose(have[task], want, atol=2e-5 * max(1, np.abs(want).max()))


def blocky(channels: int, density: float, team: int) -> nn.Conv2d:
    """Neighbouring outputs have their zeros at the same places."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    mask = torch.rand((channels // team, channels, 3, 3), generator=torch.Generator().manual_seed(0)) < density
    conv.weight.data.mul_(mask.repeat_interleave(team, 0))
    return conv


@pytest.mark.parametrize(("team", "zeros_of"), [(2, 2), (4, 4), (4, 1), (2, 4)])
@pytest.mark.parametrize("size", [(9, 9), (14, 14), (28, 5)])
def test_outputs_summed_together(team: int, zeros_of: int, size: tuple[int, int], always: None) -> None:
    program = to_program(blocky(24, 0.2, zeros_of), (torch.zeros(1, 24, *size),), ("map",))
    x = example(1, 24, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("targets.kernels.sparse_methods"), "_TEAMS", (team,))
        have = run_built(program, DEVICE, x)["map"]
    want = answers(program, x)["map"]
    assert np.allclose(have, want, atol=1e-5 * np.abs(want).max())


def test_blocks_of_zeros_are_skipped_together() -> None:
    device = cpu_device(bits=512)
    layers = [
        SparseLayer(64, (28, 28), conv.weight.detach().numpy(), Window((3, 3), padding=(1,) * 4), 1, 28, 28)
        for conv in (blocky(64, 0.1, 4), blocky(64, 0.1, 1))
    ]
    assert [layer.candidates(device)[0].split.team for layer in layers] == [4, 1]
    assert layers[0].nonzeros == 4 * layers[0].places(4) and layers[0].key != layers[1].key
    assert layers[0].candidates(device)[0].cycles < 0.7 * layers[1].candidates(device)[0].cycles


def test_only_what_is_mostly_zero_is_sparse() -> None:
    for density, kind in ((0.1, "sparse"), (0.7, "dense")):
        net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
        program = to_program(thinned(net, density), (torch.zeros(1, 64, 28, 28),), ("map",))
        assert kernels(program) == {kind}


@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=st.integers(1, 2),
    chunk=st.sampled_from([1, 2, 5, 1 << 30]), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bits=st.sampled_from([256, host_bits()]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_window_any_density(
    channels: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: int, chunk: int, density: float, bits: int, seed: int,
) -> None:  # fmt: skip
    if any(dilation * (k - 1) + 1 > s + 2 * p for k, s, p in zip(kernel, size, padding, strict=True)):
        return
    conv = thinned(nn.Conv2d(*channels, kernel, stride, padding, dilation), density, seed)
    x = example(1, channels[0], *size, seed=seed)
    with torch.no_grad():
        want = conv.double()(torch.from_numpy(x).double()).numpy()
    program = to_program(conv.float(), (torch.zeros(1, channels[0], *size),), ("map",))
    splits = SparseConvolution.splits

    def one(kernel: SparseConvolution, device: Device) -> list[SparseConvolution]:
        found = splits(kernel, device)
        return [replace(found[seed % len(found)], chunk=chunk)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SPARSE, "sparse_layers", everything)
        patch.setattr(SparseConvolution, "splits", one)
        have = run_built(program, cpu_device(bits=bits), x)["map"]
    assert np.allclose(have, want, atol=1e-5 * max(1, np.abs(want).max()))


@given(
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)), kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    bits=st.sampled_from([256, host_bits()]),
)  # fmt: skip
@example_of(size=(3, 3), kernel=(1, 1), stride=(2, 2), padding=(1, 1), bits=host_bits())  # same size, other pixels
@settings(max_examples=15, deadline=None)
def test_any_window_reads_regions_as_it_reads_a_plane(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], bits: int
) -> None:
    if any(k > s + 2 * p for k, s, p in zip(kernel, size, padding, strict=True)):
        return
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, kernel, stride, padding)
    x = example(1, 3, *size)
    net = thinned(nn.Sequential(first, nn.ReLU(), second), 0.5)
    with torch.no_grad():
        want = net.double()(torch.from_numpy(x).double()).numpy()
    program = to_program(net.float(), (torch.zeros(1, 3, *size),), ("map",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SPARSE, "sparse_layers", everything)
        have = run_built(program, cpu_device(bits=bits), x)["map"]
    assert np.allclose(have, want, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 1e-41])
def test_special_values_reach_only_the_outputs_whose_weights_read_them(special: float, always: None) -> None:
    conv = thinned(nn.Conv2d(4, 6, 3, padding=1), 0.5)
    x = example(1, 4, 12, 12)
    x[0, 2, 5, 5] = special
    program = to_program(conv, (torch.zeros(1, 4, 12, 12),), ("map",))
    have = run_built(program, DEVICE, x)["map"]
    reads = np.zeros((6, 12, 12), bool)
    reads[:, 4:7, 4:7] = conv.weight.detach().numpy()[:, 2, ::-1, ::-1] != 0
    assert np.array_equal(np.isfinite(have[0]), ~reads | np.isfinite(special))
    x[0, 2, 5, 5] = 0
    clean = run_built(program, DEVICE, x)["map"]
    assert np.array_equal(have[0][~reads], clean[0][~reads])


BORDERS = st.tuples(*[st.integers(0, 3)] * 4)


@given(height=st.integers(1, 40), width=st.integers(1, 40), lanes=st.sampled_from([4, 8, 16]), border=BORDERS)
@settings(max_examples=60, deadline=None)
def test_regions_hold_every_pixel_once(height: int, width: int, lanes: int, border: tuple[int, int, int, int]) -> None:
    layout = Layout(Regions.of(height, width, lanes), border)
    assert layout.regions.lanes == lanes
    y, x = np.mgrid[:height, :width]
    places = layout.places(y, x)
    assert len(np.unique(places)) == height * width and places.min() >= 0
    assert places.max() < layout.vectors * lanes
    down, across = layout.pixels()
    row, column = divmod(places // lanes, layout.across)
    assert np.array_equal(down[row * layout.across + column, places % lanes], y), "a pixel lies where its place says"
    assert np.array_equal(across[row * layout.across + column, places % lanes], x)


@given(height=st.integers(1, 30), width=st.integers(1, 30), lanes=st.sampled_from([4, 8, 16]), border=BORDERS)
@settings(max_examples=60, deadline=None)
def test_a_border_repeats_the_neighbours_pixels(
    height: int, width: int, lanes: int, border: tuple[int, int, int, int]
) -> None:
    layout = Layout(Regions.of(height, width, lanes), border)
    plane = np.random.default_rng(0).standard_normal((height, width))
    flat = np.full(layout.vectors * lanes + 2 * lanes, 99.0)
    y, x = np.mgrid[:height, :width]
    flat[lanes + layout.places(y, x)] = plane
    which, starts, counts = layout.copies()
    made = flat.copy()
    for vector, start, count in zip(which, starts, counts, strict=True):
        made[lanes + vector * lanes :][:lanes] = np.where(count, flat[lanes + start :][:lanes], 0)
    if any(border):
        y, x = layout.pixels()
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        wanted = np.where(inside, plane[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)], 0)
        assert np.array_equal(made[lanes:-lanes].reshape(-1, lanes), wanted)


def test_shifts_read_what_places_say() -> None:
    layout = Layout(Regions.of(14, 14, 16))
    places = layout.places(*layout.regions.pixels(Window((3, 3), padding=(1, 1, 1, 1))))
    found = shifts(places)
    assert found is not None
    starts, counts = found
    source = np.random.default_rng(0).standard_normal(layout.vectors * 16 + 32)
    spans = np.stack([source[16 + start : 32 + start] for start in starts])
    wanted = np.where(places >= 0, source[16 + np.maximum(places, 0)], 0)
    assert np.array_equal(np.where(counts, spans, 0), wanted)
    apart: Array = np.array([[0, 2, 4, 6]])
    assert shifts(apart) is None


def test_a_layer_says_what_its_other_form_would_have_taken() -> None:
    net = nn.Sequential(thinned(nn.Conv2d(64, 64, 3, padding=1), 0.1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    program = to_program(net, (torch.zeros(1, 64, 28, 28),), ("map",))
    calls = json.loads(CpuTarget().plan(program, DEVICE).files["kernels.json"])["calls"]
    told = {call["kernel"]: call for call in calls if call["layer"]}
    sparse = told["sparse"]
    assert re.fullmatch(r"dense [1-9]\.\d\dx \(estimated\)", sparse["instead"])
    assert sparse["macs"] == 64 * 64 * 9 * 28 * 28
    assert 0.05 < sparse["density"] < 0.15 and sparse["work"] == pytest.approx(sparse["density"] * sparse["macs"])
    assert [call["instead"] for name, call in told.items() if name != "sparse"] == [""]


# Nothing is written beyond a kernel's own buffer, and no input is changed

GUARD = 64


def guarded(function: Any, arrays: list[Array], made: tuple[int, ...]) -> Array:
    """Run a kernel whose result lies between guard zones; the result."""
    target = tvm.target.Target(dict(DEVICE.target))
    with target:
        run = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target)["main"]
    room = np.full(int(np.prod(made)) + 2 * GUARD, 12345.0, np.float32)
    start = (-room.ctypes.data // 4) % GUARD  # results are aligned to a cache line
    inside = slice(start + 16, start + 16 + int(np.prod(made)))
    given = [tvm.runtime.tensor(array) for array in arrays]
    run(*given, tvm.runtime.from_dlpack(room[inside].reshape(made)))
    outside = np.delete(room, np.arange(inside.start, inside.stop))
    assert (outside == 12345.0).all(), "written outside"
    for tensor, array in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    return room[inside].reshape(made)


@given(
    channels=st.integers(1, 40), size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    border=st.tuples(*[st.integers(0, 2)] * 4), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=6, deadline=None, derandomize=True)
def test_values_come_back_from_regions_and_nothing_else_is_touched(
    channels: int, size: tuple[int, int], border: tuple[int, int, int, int], seed: int
) -> None:
    lanes = DEVICE.vector_lanes
    layout, blocks = Layout(Regions.of(*size, lanes), border), -(-channels // lanes)
    x = example(1, channels, *size, seed=seed)
    y, column = layout.pixels()
    places = np.where((y >= 0) & (y < size[0]) & (column >= 0) & (column < size[1]), y * size[1] + column, -1)
    table = places.astype(np.int32)
    blocked = np.zeros((1, blocks * lanes, *size), np.float32)
    blocked[:, :channels] = x
    blocked = np.ascontiguousarray(blocked.reshape(1, blocks, lanes, *size).transpose(0, 1, 3, 4, 2))
    flat = guarded(group_blocks(channels, *size, places.shape), [blocked, table.reshape(-1)], (layout.size(channels),))
    same = regroup((1, channels, *size), 0, size[0] * size[1], channels, places.shape)
    inner = slice(lanes, -lanes)
    assert np.array_equal(guarded(same, [x, table.reshape(-1)], (layout.size(channels),))[inner], flat[inner])
    assert np.array_equal(guarded(ungroup(layout, channels), [flat], x.shape), x)
    rows, columns = layout.regions.pixels(Window((1, 1)))
    own = np.where((rows < size[0]) & (columns < size[1]), rows * size[1] + columns, -1).astype(np.int32)
    back = guarded(ungroup_blocks(layout, channels), [flat, own.reshape(-1)], blocked.shape)
    assert np.array_equal(back, blocked)


@given(
    images=st.integers(1, 2), segments=st.lists(st.integers(1, 35), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)  # fmt: skip
@settings(max_examples=8, deadline=None, derandomize=True)
def test_blocks_become_planes_by_squares(images: int, segments: list[int], size: tuple[int, int]) -> None:
    assume(size[0] * size[1] >= DEVICE.vector_lanes)
    channels = Channels(tuple(segments), DEVICE.vector_lanes)
    x = example(images, channels.count, *size)
    blocked = np.ascontiguousarray(np.moveaxis(channels.pack(x, 1, fill=7.0), 2, -1))
    assert np.array_equal(guarded(unblock_squares(blocked.shape, segments), [blocked], x.shape), x)


@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=6, deadline=None, derandomize=True)
def test_a_sparse_kernel_writes_its_outputs_alone(
    channels: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int], density: float, seed: int
) -> None:
    inputs, outputs = channels
    window = Window(kernel, padding=(kernel[0] // 2, kernel[1] // 2) * 2)
    weights = thinned(nn.Conv2d(inputs, outputs, kernel), density, seed).weight.detach().numpy()
    made = (s + 2 * (k // 2) - k + 1 for s, k in zip(size, kernel, strict=True))
    layer = SparseLayer(inputs, size, weights, window, 1, *made)
    candidates = layer.candidates(DEVICE)
    function, arrays = candidates[seed % len(candidates)].trial()
    arrays[0][:] = np.nan
    guarded(function, arrays[:-1], arrays[-1].shape)
