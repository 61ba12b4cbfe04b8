"""Channels through operators that go over a dimension: what they mix goes as one, or is summed as a product."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from compressor.graph import argument, name_of, shape_of
from compressor.ids import distinct, varies, whole
from compressor.macs import macs_of

if TYPE_CHECKING:
    from compressor.channels import Analysis

_MORE_THAN_ZERO = frozenset(
    ("sigmoid", "hardsigmoid", "log_sigmoid", "exp", "exp2", "softplus", "cos", "softmax", "_softmax", "reciprocal",
     "rsqrt", "pow", "add", "sub", "rsub")
)  # fmt: skip


def together(run: "Analysis", ids: Tensor, over: set[int]) -> bool:
    """Make what differs only in these dimensions one class each; False where nothing else would tell channels apart."""
    mixed = [d for d in over if varies(ids, d)]
    if mixed and not any(varies(ids, d) for d in range(ids.dim()) if d not in over):
        return False
    for d in mixed:
        small = distinct(ids)
        run.classes.merge(small, small.narrow(d, 0, 1).expand(small.shape))
    return True


def reduced(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Mean, sum, softmax: what they go over stays or goes as one."""
    value = node.meta["val"]
    ids = run.classes.root(run.ids(node.args[0]))
    shape = tuple((value if isinstance(value, Tensor) else value[0]).shape)
    if run.constant(node.args[0]) is not None or not ids.dim():
        return None
    given = argument(node, "dim")
    dims = given if isinstance(given, list | tuple) else [] if given is None else [given]
    over = {d % ids.dim() for d in dims} if dims else set(range(ids.dim()))
    mixed = [d for d in over if varies(ids, d)]
    alone = len(mixed) == 1 and not any(varies(ids, d) for d in range(ids.dim()) if d not in over)
    if alone and name_of(node) == "sum" and _is_product(run, node.args[0]):  # such as two towers' scores
        run.multiply(node, run.classes.tie(ids, mixed[0]), macs_of(node), summed=True)
        return whole(shape)
    if not together(run, ids, over):
        return None
    ids = run.classes.root(ids)
    if shape == tuple(ids.shape):
        return ids
    for d in sorted(over, reverse=True):
        ids = ids.narrow(d, 0, 1)
    return ids.reshape(shape)


def _is_product(run: "Analysis", node: Any) -> bool:
    """Whether a value is the product, element by element, of two activations, of which one is 0 where its layer is."""
    factors = node.args if name_of(node) == "mul" else ()
    whole = [isinstance(a, fx.Node) and run.constant(a) is None and shape_of(a) == shape_of(node) for a in factors]
    return len(whole) == 2 and all(whole) and len(set(factors)) == 2 and any(map(_keeps_zero, factors))


def _keeps_zero(node: Any) -> bool:
    """Whether nothing behind a value, as far as it is computed element by element of one, makes more of 0."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        if name_of(node) in _MORE_THAN_ZERO:
            return False
        node = node.all_input_nodes[0]
    return True
