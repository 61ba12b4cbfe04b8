"""Channels through products: of two activations (attention), and of an activation with a weight that is no layer's.

Of the dimensions of a product of activations one can shrink. Where the factors differ in a dimension both share
without summing (attention's heads), each index goes whole: its queries, keys and values together. Otherwise one
factor's other dimension passes its channels on (experts summed by weight), or, where both factors' or neither's would,
the dimension summed over ties the two factors' channels.
"""

from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, fx

from compressor.graph import argument, shape_of
from compressor.ids import spread, varies, whole
from compressor.macs import macs_of

if TYPE_CHECKING:
    from compressor.channels import Analysis


def matmul(run: "Analysis", node: fx.Node) -> Tensor | None:
    """matmul, bmm, mm of two activations, or of an activation with a matrix."""
    left, right = node.args[:2]
    if not all(isinstance(one, fx.Node) for one in (left, right)) or run.constant(left) is not None:
        return None
    name, shape = run.constant(right), shape_of(node)
    if name is not None:
        return _weighted(run, node, run.ids(left), name, 0) if run.tensor(name).dim() == 2 else None
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
    if name is not None:
        if shared or len(summed) != 1 or len(columns) != 1:
            return None
        made: Tensor | None = _weighted(run, node, left, name, second.index(summed[0]))
    else:
        made = _product(run, node, left, _arranged(run.ids(operands[1]), second, shared, summed, columns))
    if made is None:
        return None
    order, sizes = [*shared, *rows, *columns], dict(zip(written, shape_of(node), strict=True))
    made = made.reshape([sizes[label] for label in order])
    return made.permute([order.index(label) for label in written])


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


def _met(run: "Analysis", *sides: tuple[Tensor, int]) -> Tensor:
    """One class for each index of a dimension that two values have in common."""
    first, second = (run.classes.tie(ids, dim) for ids, dim in sides)
    run.classes.merge(first, second)
    return run.classes.root(first)


def _weighted(run: "Analysis", node: fx.Node, left: Tensor, name: str, reads: int) -> Tensor:
    """A product with a matrix that reads channels in one dimension and writes them in the other."""
    along, writes = run.classes.tie(left, left.dim() - 1), run.axis(name, 1 - reads)
    run.bind(name, {reads: along, 1 - reads: writes})
    run.contract(node, name, 1 - reads, reads)
    return spread(writes, (*left.shape[:-1], len(writes)), left.dim() - 1)


def _arranged(ids: Tensor, labels: str, *parts: list[str]) -> Tensor:
    """Ids with one dimension for each label of the first part and one for each further part as a whole."""
    ordered = ids.permute([labels.index(label) for part in parts for label in part])
    shared, sizes = len(parts[0]), list(ordered.shape)
    first = shared + len(parts[1])
    return ordered.reshape([*sizes[:shared], prod(sizes[shared:first]), prod(sizes[first:])])
