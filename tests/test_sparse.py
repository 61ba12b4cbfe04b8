"""Sparse convolutions: whatever the window, the density or the neighbours, the dense answer, and no write elsewhere."""

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import answers, cpu_device, example, host_bits, run_built, settle, to_program
from torch import Tensor, nn

from targets.base import Array, Program
from targets.cpu import CpuTarget
from targets.kernels.regions import Regions, shifts
from targets.kernels.sparse import SparseConvolution
from targets.kernels.window import Window

SPARSE = import_module("targets.passes.sparse")  # the package has a function of that name
DEVICE = cpu_device(bits=host_bits())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(SPARSE, "_pays", lambda *_: True)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SPARSE, "_pays", lambda *_: True)
        patch.setattr(SparseConvolution, "chunked", lambda kernel, *_: replace(kernel, chunk=chunk))
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
        patch.setattr(SPARSE, "_pays", lambda *_: True)
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


@given(height=st.integers(1, 40), width=st.integers(1, 40), lanes=st.sampled_from([4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_regions_hold_every_pixel_once(height: int, width: int, lanes: int) -> None:
    regions = Regions.of(height, width, lanes)
    assert regions.lanes == lanes
    y, x = np.mgrid[:height, :width]
    places = regions.places(y, x)
    assert len(np.unique(places)) == height * width and places.min() >= 0
    assert places.max() < regions.positions * lanes
    own = regions.places(*regions.pixels(Window((1, 1))))
    kept = own[own >= 0]
    assert np.array_equal(kept, np.flatnonzero(own.reshape(-1) >= 0)), "the identity lies as itself"


def test_shifts_read_what_places_say() -> None:
    regions = Regions.of(14, 14, 16)
    places = regions.places(*regions.pixels(Window((3, 3), padding=(1, 1, 1, 1))))
    found = shifts(places)
    assert found is not None
    starts, counts = found
    source = np.random.default_rng(0).standard_normal(regions.positions * 16 + 32)
    spans = np.stack([source[16 + start : 32 + start] for start in starts])
    wanted = np.where(places >= 0, source[16 + np.maximum(places, 0)], 0)
    assert np.array_equal(np.where(counts, spans, 0), wanted)
    apart: Array = np.array([[0, 2, 4, 6]])
    assert shifts(apart) is None
