"""Whether two traced networks answer alike: both run in float64, on inputs like the examples and on quite others."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressor.errors import CompressError
from compressor.graph import tensors_of

EXACT = 1e-6
"""Largest `difference` of two networks that count as the same."""

_MOST_DRAWS, _ENOUGH = 16, 4096  # other inputs: as many as hold together so many numbers, where one is small
_CHEAP = 20_000_000  # numbers of a network in all that are drawn for
_LARGEST = 2**62  # integer that is drawn
_LEAST_SCALE = 1e-5  # of the largest answer: numbers below are compared with this
_NOTHING = 1e-9  # answers that are 0 but for rounding are compared with this


def difference(reference: fx.GraphModule, network: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Largest difference of any answer to the reference's, relative to the largest at its index of some dimension.

    A score beside coordinates in pixels is thus compared with scores. What the examples leave unseen, such as units
    that are dead for them or a flag that is always set, inputs of other signs and other integers may show; those that
    the reference itself does not take, or answers without a finite number, say nothing.

    Infinite for another shape; NaN where an answer is.

    Raises:
        CompressError: a network cannot be computed in float64 on the examples.
    """
    left, right, worst = in_double(reference), in_double(network), 0.0
    for tried, must in _tried(inputs, sum(value.numel() for value in tensors_of(reference).values())):
        wanted = _run(left, tried, must)
        if wanted is None:
            continue
        given = _run(right, tried, must)
        if given is None:
            return float("inf")
        for one, other in zip(wanted, given, strict=True):
            gap = _gap(one, other)
            worst = gap if not gap <= worst else worst
        if not worst <= EXACT:
            break
    return worst


def _tried(inputs: tuple[Tensor, ...], size: int) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Inputs, and whether a reference with so many numbers has to take them."""
    generator = torch.Generator().manual_seed(0)

    def near(x: Tensor, scale: float) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return x.double() * scale + 0.1 * scale * noise if x.is_floating_point() else _wide(x)

    def other(x: Tensor, least: int | None = None) -> Tensor:
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            return x.double().abs().mean().nan_to_num() * noise
        if x.is_complex() or not x.numel():
            return _wide(x)
        whole = x.to(torch.int64)
        low = int(whole.min()) if least is None else min(least, int(whole.min()))
        high = 1 if x.dtype == torch.bool else min(int(whole.max()), _LARGEST)
        return torch.randint(low, high + 1, x.shape, generator=generator).to(x.dtype)

    yield tuple(map(_wide, inputs)), True
    for scale in (1.0, 0.3):
        yield tuple(near(x, scale) for x in inputs), False
    for at, x in enumerate(inputs):  # numbers that only mean something together, such as ids and flags, one by one
        if not x.is_floating_point():
            yield tuple(other(y, 0) if k == at else near(y, 1.0) for k, y in enumerate(inputs)), False
    enough = min(_ENOUGH // max(1, sum(x.numel() for x in inputs)), _CHEAP // max(1, size))
    for turn in range(min(_MOST_DRAWS, max(1, enough))):
        yield tuple(other(x, 0 if turn % 2 else None) for x in inputs), False


def _wide(x: Tensor) -> Tensor:
    """An input in double precision, where it has one."""
    return x.double() if x.is_floating_point() else x.to(torch.complex128) if x.is_complex() else x


def _run(network: fx.GraphModule, inputs: tuple[Tensor, ...], must: bool) -> list[Tensor] | None:
    """A network's answers; None where it need not take the inputs and does not, or answers without a finite number."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of what the graphs create without naming a type
    try:
        with torch.no_grad():
            answers = [answer.double() for answer in network(*inputs)]
    except (RuntimeError, IndexError, ValueError) as error:
        if must:
            raise CompressError(f"The network cannot be computed in float64, to prove a cut of it: {error}") from error
        return None
    finally:
        torch.set_default_dtype(usual)
    return answers if must or all(bool(answer.isfinite().all()) for answer in answers) else None


def _gap(wanted: Tensor, given: Tensor) -> float:
    if wanted.shape != given.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    size = wanted.abs()
    scale = largest = size.max()
    for dim in range(size.dim()):
        scale = torch.minimum(scale, size.amax([d for d in range(size.dim()) if d != dim], keepdim=True))
    return float(((wanted - given).abs() / scale.clamp_min(max(_LEAST_SCALE * float(largest), _NOTHING))).max())


def in_double(network: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes in float64: tensors, and the float types that casts and creations in the graph name."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(network.graph, {}))
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _doubled)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _doubled)
    tensors = {
        name: nn.Parameter(value.detach().double(), requires_grad=False) if value.is_floating_point() else value
        for name, value in tensors_of(network).items()
    }
    return fx.GraphModule(tensors, graph)


def _doubled(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument
