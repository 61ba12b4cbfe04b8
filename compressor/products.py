"""Channels through products: of two activations (attention), and of an activation with a weight that is no layer's.

Of the dimensions of a product of activations one can shrink. Where the factors differ in a dimension both share
without summing (attention's heads), each index goes whole: its queries, keys and values together. Otherwise one
factor's other dimension passes its channels on (experts summed by weight), or, where both factors' or neither's would,
the dimension summed over ties the two factors' channels.
"""

from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from compressor.graph import argument, shape_of
from compressor.ids import spread, varies, whole
from compressor.macs import macs_of

if TYPE_CHECKING:
    from compressor.channels import Analysis


def matmul(run: "Analysis", node: fx.Node) -> Tensor | None:
    """matmul, bmm, mm of two activations, or of an activation and a matrix."""
    left, right = node.args[:2]
    if not all(isinstance(one, fx.Node) for one in (left, right)):
        return None
    if run.constant(left) is not None:
        return _from_left(run, node, str(run.constant(left)), right)
    name, shape = run.constant(right), shape_of(node)
    if name is not None:
        ids, dims = run.ids(left), run.tensor(name).dim()
        if dims < 2 or _varies_in(run, ids, range(ids.dim() - dims, ids.dim() - 2)):
            return None
        return spread(_weighted(run, node, ids, name, dims - 2, dims - 1), shape, len(shape) - 1)
    first, second = run.ids(left), run.ids(right)
    if min(first.dim(), second.dim()) < 2:
        return None
    first = first.expand(*shape[:-2], *first.shape[-2:])
    return _product(run, node, first, second.expand(*shape[:-2], *second.shape[-2:]))


def einsum(run: "Analysis", node: fx.Node) -> Tensor | None:
    """A permutation, or a product of two factors, brought into the form of a product of matrices."""
    terms, _, written = str(node.args[0]).replace(" ", "").partition("->")
    labels, operands = terms.split(","), list(node.args[1])  # type: ignore[arg-type]
    if "->" not in str(node.args[0]) or "." in terms or any(len(set(t)) < len(t) for t in (*labels, written)):
        return None
    if len(operands) == 1 and set(terms) == set(written) and run.constant(operands[0]) is None:
        return run.ids(operands[0]).permute([terms.index(label) for label in written])  # type: ignore[no-any-return]
    if len(operands) != 2:
        return None
    if run.constant(operands[0]) is not None:
        labels, operands = labels[::-1], operands[::-1]
    (first, second), name = labels, run.constant(operands[1])
    shared = [label for label in first if label in second and label in written]
    summed = [label for label in first if label in second and label not in written]
    rows = [label for label in first if label not in second]
    columns = [label for label in second if label not in first]
    if run.constant(operands[0]) is not None or not {*rows, *columns} <= set(written):
        return None
    left = _arranged(run.ids(operands[0]), first, shared, rows, summed)
    order, sizes = [*shared, *rows, *columns], dict(zip(written, shape_of(node), strict=True))
    full = tuple(sizes[label] for label in order)
    if name is not None:
        if len(summed) != 1 or not columns or _varies_in(run, left, range(len(shared))):
            return None
        last = max(columns, key=written.index)
        made = _weighted(run, node, left, name, second.index(summed[0]), second.index(last))
        return spread(made, full, order.index(last)).permute([order.index(label) for label in written])
    product = _product(run, node, left, _arranged(run.ids(operands[1]), second, shared, summed, columns))
    return None if product is None else product.reshape(full).permute([order.index(label) for label in written])


def attention(run: "Analysis", node: fx.Node) -> Tensor | None:
    """Scaled dot-product attention: two products with the scores between them.

    The default scale depends on how many channels queries have, so that without heads those stay.
    """
    query, key, value = (run.ids(a) for a in node.args[:3])
    given = [run.constant(a) for a in node.args[:3]]
    if any(given) or argument(node, "enable_gqa", False) or min(one.dim() for one in (query, key, value)) < 2:
        return None
    shape = shape_of(node)
    query, key, value = (one.expand(*shape[:-2], *one.shape[-2:]) for one in (query, key, value))
    each = prod(query.shape[:-1]) * key.shape[-2]
    scores = _product(run, node, query, key.mT, each * query.shape[-1])
    if scores is None:
        return None
    if run.found.products[-1].summed and argument(node, "scale") is None:
        run.classes.fix(run.found.products[-1].ids)
    mask = argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        _masked(run, scores, run.ids(mask))
    return _product(run, node, scores, value, each * value.shape[-1])


def _masked(run: "Analysis", scores: Tensor, mask: Tensor) -> None:
    """A mask with a row for each head goes with the heads; any other stays."""
    offset = scores.dim() - mask.dim()
    for dim in [d for d in range(scores.dim()) if varies(run.classes.root(scores), d)]:
        if dim >= offset and mask.shape[dim - offset] > 1:
            run.classes.merge(run.classes.tie(scores, dim), run.classes.tie(mask, dim - offset))
            return
    run.classes.fix(mask)


def _product(run: "Analysis", node: fx.Node, left: Tensor, right: Tensor, macs: int | None = None) -> Tensor | None:
    """Ids of (..., rows, columns) from those of (..., rows, summed) and (..., summed, columns), batches alike."""
    macs = macs_of(node) if macs is None else macs
    left, right = run.classes.root(left), run.classes.root(right)
    shape = (*left.shape[:-1], right.shape[-1])
    batch = [d for d in range(len(shape) - 2) if varies(left, d) or varies(right, d)]
    if len(batch) == 1:
        each = _met(run, (left, batch[0]), (right, batch[0]))
        run.multiply(node, each, macs, summed=False)
        return spread(each, shape, batch[0])
    rows, columns = varies(left, -2), varies(right, -1)
    summed = varies(left, -1) or varies(right, -2)
    if batch or not (rows or columns or summed):
        return None
    if summed and rows == columns:
        run.multiply(node, _met(run, (left, left.dim() - 1), (right, right.dim() - 2)), macs, summed=True)
        return whole(shape)
    passed, other, dim = (right, left, len(shape) - 1) if columns else (left, right, len(shape) - 2)
    run.classes.fix(other)  # of an outer product only the columns' channels can be told apart
    each = run.classes.tie(passed, dim)
    run.multiply(node, each, macs, summed=False)
    return spread(each, shape, dim)


def _from_left(run: "Analysis", node: fx.Node, name: str, right: Any) -> Tensor | None:
    """A matrix times an activation: it mixes rows, as along a graph's edges, and others pass; or it reads rows."""
    ids = run.classes.root(run.ids(right))
    free = [d for d in range(ids.dim()) if varies(ids, d)]
    if run.constant(right) is not None or run.tensor(name).dim() != 2 or ids.dim() < 2 or len(free) > 1:
        return None
    dim = free[0] if free else ids.dim() - 1
    if dim == ids.dim() - 2:
        return spread(_weighted(run, node, ids.mT, name, 1, 0), shape_of(node), dim)
    each = run.classes.tie(ids, dim)
    run.bind(name, {})
    run.multiply(node, each, macs_of(node), summed=False)
    return spread(each, shape_of(node), dim)


def _met(run: "Analysis", *sides: tuple[Tensor, int]) -> Tensor:
    """One class for each index of a dimension that two values have in common."""
    first, second = (run.classes.tie(ids, dim) for ids, dim in sides)
    run.classes.merge(first, second)
    return run.classes.root(first)


def _weighted(run: "Analysis", node: fx.Node, left: Tensor, name: str, reads: int, writes: int) -> Tensor:
    """Ids of the channels that a product writes with a matrix, or with one for each index of other dimensions."""
    along, made = run.classes.tie(left, left.dim() - 1), run.axis(name, writes)
    run.bind(name, {reads: along, writes: made})
    run.contract(node, name, writes, reads)
    return made


def _varies_in(run: "Analysis", ids: Tensor, dims: range) -> bool:
    """Whether channels lie in one of these dimensions, those before the first not counted."""
    return any(varies(run.classes.root(ids), d) for d in dims if d >= 0)


def _arranged(ids: Tensor, labels: str, *parts: list[str]) -> Tensor:
    """Ids with one dimension for each label of the first part and one for each further part as a whole."""
    ordered = ids.permute([labels.index(label) for part in parts for label in part])
    shared, sizes = len(parts[0]), list(ordered.shape)
    first = shared + len(parts[1])
    return ordered.reshape([*sizes[:shared], prod(sizes[shared:first]), prod(sizes[first:])])
