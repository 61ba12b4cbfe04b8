"""Multiply-adds of one inference, read from the shapes of a traced graph."""

from collections.abc import Callable, Mapping
from math import prod

from torch import Tensor, fx

from compressor.graph import argument, name_of, shape_of, tensor_of

Count = Callable[[fx.Node], int]


def count_macs(network: fx.GraphModule) -> tuple[int, int]:
    """(multiply-adds of one inference, those with a weight that is not zero).

    Products of two activations (attention) and recurrent layers count fully in both.
    """
    dense = effective = 0
    for node in network.graph.nodes:
        work = macs_of(node)
        if not work:
            continue
        dense += work
        constants = [tensor_of(network, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        weights = [] if name_of(node) in _RECURRENT else [c for c in constants if c.dim() > 1]
        effective += work if len(weights) != 1 else _nonzero_share(work, weights[0])
    return dense, effective


def macs_of(node: fx.Node) -> int:
    """Multiply-adds of one operator; 0 for what only moves, compares or scales element by element."""
    count = _COUNTS.get(name_of(node)) if node.op == "call_function" else None
    return count(node) if count is not None else 0


def _nonzero_share(work: int, weight: Tensor) -> int:
    return work // weight.numel() * int((weight != 0).sum())  # exact: every weight is used equally often


def _operand(node: fx.Node, position: int) -> tuple[int, ...]:
    return shape_of(node.args[position])  # type: ignore[arg-type]


def _convolution(node: fx.Node) -> int:
    """Every written position takes (channels in / groups) * kernel products."""
    return prod(shape_of(node)) * prod(_operand(node, 1)[1:])


def _transposed(node: fx.Node) -> int:
    """Every position read gives (channels out / groups) * kernel products."""
    return prod(_operand(node, 0)) * prod(_operand(node, 1)[1:])


def _product(position: int) -> Count:
    """A matrix product whose operand at `position` has the summed dimension last."""
    return lambda node: prod(shape_of(node)) * _operand(node, position)[-1]


def _attention(node: fx.Node) -> int:
    """Queries by keys, then weights by values; grouped queries included."""
    query, key, value = (_operand(node, k) for k in range(3))
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node) -> int:
    """As one contraction of all operands; 0 for a sum or permutation of a single one."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if len(operands) < 2:
        return 0
    left, _, right = equation.partition("->")
    sizes: dict[str, int] = {}
    for labels, operand in zip(left.split(","), operands, strict=True):
        shape = list(shape_of(operand))
        before, dots, after = labels.partition("...")
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(reversed(after), reversed(shape), strict=False) if dots else ())
    written = right if "->" in equation else "".join(label for label in sizes if left.count(label) == 1)
    return prod(shape_of(node)) * prod(size for label, size in sizes.items() if label not in written)


def _recurrent(node: fx.Node) -> int:
    """Every matrix once for each step of each sequence."""
    matrices = [n for n in argument(node, "params", ()) if len(shape_of(n)) == 2]
    return prod(_operand(node, 0)[:-1]) * sum(prod(shape_of(n)) for n in matrices)


_RECURRENT = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu"])

_COUNTS: Mapping[str, Count] = {
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], _convolution),
    **dict.fromkeys(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"], _transposed),
    **dict.fromkeys(["linear", "matmul", "bmm", "mm", "mv", "dot"], _product(0)),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], _product(1)),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(_RECURRENT, _recurrent),
}
