"""Weights in blocks that are kept or pruned together: neighbouring outputs, or tiles of outputs and inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

Block = tuple[int, int]
"""Outputs and inputs of a block; (1, 1) is each weight alone."""

ALONE: Block = (1, 1)


def block_of(shape: Sequence[int], block: Block) -> Block:
    """What of a weight of this shape goes together: outputs that are no multiple of a block's go each alone.

    Tiles cover any weight, those at its edges in part.
    """
    return ALONE if block[1] == 1 and shape[0] % block[0] else block


def blocks(values: Tensor, block: Block, fill: float) -> Tensor:
    """(blocks, weights of one) of a weight (outputs, inputs, kernel...) or vector; the first is never `fill`.

    Args:
        fill: what tiles hold where they reach over the edges.
    """
    rows, columns = block_of(values.shape, block)
    whole = values.reshape(len(values), values.shape[1] if values.dim() > 1 else 1, -1)
    down, across = (-(-size // each) for size, each in zip(whole.shape, (rows, columns), strict=False))
    padded = whole.new_full((down * rows, across * columns, whole.shape[2]), fill)
    padded[: len(whole), : whole.shape[1]] = whole
    apart = padded.reshape(down, rows, across, columns, -1)
    return apart.permute(0, 2, 4, 1, 3).reshape(-1, rows * columns)


def spread(each: Tensor, shape: Sequence[int], block: Block) -> Tensor:
    """A weight of this shape that holds, in every block, what `each` has for it."""
    rows, columns = block_of(shape, block)
    inputs = shape[1] if len(shape) > 1 else 1
    down, across = -(-shape[0] // rows), -(-inputs // columns)
    wide = each.reshape(down, across, -1).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: shape[0], :inputs].reshape(torch.Size(shape))
