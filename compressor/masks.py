"""Which weights a ticket keeps: the ones worth most, one by one, in blocks or tiles, or N of each M inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.blocks import ALONE, Block, block_of, blocks, spread
from compressor.ranks import highest_rank

Scope = Literal["global", "layer"]
Scores = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How kept weights may lie.

    Attributes:
        block: outputs and inputs that are neighbours, whose weights at one tap are kept or pruned together.
        of: where not 0, `n` of each `of` neighbouring inputs are kept, at each output and kernel element.
    """

    block: Block = ALONE
    n: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """"free", "4x1" for blocks of four outputs, "8x16" for tiles of 8 outputs and 16 inputs, "2:4" for two of four
        inputs.

        Raises:
            ValueError: none of these.
        """
        first, colon, second = text.partition(":")
        rows, times, columns = text.partition("x")
        if text == "free":
            return cls()
        if colon and first.isdigit() and second.isdigit() and 0 < int(first) < int(second):
            return cls(n=int(first), of=int(second))
        if times and rows.isdigit() and columns.isdigit() and int(rows) > 1 and int(columns) > 0:
            return cls(block=(int(rows), int(columns)))
        raise ValueError("a pattern is 'free', blocks such as '4x1', tiles such as '8x16', or N of M such as '2:4'")

    def fits(self, weight_OI: Tensor) -> bool:
        """Whether a weight's outputs, or inputs, are whole multiples; tiles fit every weight."""
        inputs = weight_OI.shape[1] if weight_OI.dim() > 1 else 1
        return block_of(weight_OI.shape, self.block) == self.block and (not self.of or inputs % self.of == 0)


def pools_of(part: Scores, scope: Scope, parts: int) -> dict[str, Tensor]:
    """The pool of each weight, int64: its part (0 to `parts`) of the whole network, or of its own layer."""
    step = parts if scope == "layer" else 0
    return {name: number + step * layer for layer, (name, number) in enumerate(part.items())}


def count(pool: Scores, alive: Scores) -> list[int]:
    """How many weights of each pool are alive."""
    pools = 1 + max((int(number.max()) for number in pool.values()), default=-1)
    counts = torch.zeros(pools, dtype=torch.int64)
    for name, number in pool.items():
        counts += torch.bincount(number[alive[name]], minlength=pools)
    return [int(size) for size in counts]


def keep_most(
    score: Scores, alive: Scores, pool: Scores, left: Sequence[int], block: Block = ALONE
) -> dict[str, Tensor]:
    """Masks that keep, of the weights of each pool that are alive, the `left` ones of the highest scores.

    Among equal scores the earlier position is kept, so the count is exact; with blocks it is exact up to one block, of
    which a pool that keeps anything has at least one, and a block's weights are of one pool. A weight whose outputs are
    no multiple of the block is pruned one by one.
    """
    units = [(*_units(score[name], alive[name], block), pool[name]) for name in score]
    value, size = (torch.cat([unit[k] for unit in units]) for k in (0, 1))
    number = torch.cat([blocks(pools, block, 0)[:, 0] for _, _, pools in units])
    order = value.argsort(descending=True, stable=True)
    order = order[number[order].argsort(stable=True)]
    sizes = torch.zeros(len(left), dtype=torch.int64).index_add_(0, number, size)
    reached = size[order].cumsum(0) - (sizes.cumsum(0) - sizes)[number[order]]
    wanted = torch.tensor(left)[number[order]]
    flat = torch.zeros_like(value, dtype=torch.bool)
    flat[order[(reached <= wanted) | ((reached == size[order]) & (wanted > 0))]] = True
    masks = {}
    for (name, value), part in zip(score.items(), torch.split(flat, [v.numel() for v, _, _ in units]), strict=True):
        masks[name] = spread(part, value.shape, block) & alive[name]
    return masks


def shares(energy: Scores, alive: Scores, block: Block = ALONE) -> dict[str, Tensor]:
    """Scores that can be compared between layers, of the energies' shapes: a block's energy, summed over its live
    weights, as a share of what would be left of its layer if every lesser block went; then divided by their number.

    The first block of a layer has all that is left of it, and what is not alive scores 0. A layer whose outputs are no
    multiple of the block has blocks of one.
    """
    found = {}
    for name, value in energy.items():
        mean, size = _units(value, alive[name], block)
        total = torch.where(size > 0, mean * size, 0.0)
        order = mean.argsort(descending=True, stable=True)
        total[order] = total[order] / total[order].cumsum(0).clamp_min(torch.finfo(total.dtype).tiny)
        share = spread(total / size.clamp_min(1), value.shape, block)
        found[name] = torch.where(alive[name], share, 0.0)
    return found


def keep_n_of_m(score: Scores, alive: Scores, n: int, of: int) -> dict[str, Tensor]:
    """Masks that keep the `n` highest scores of each `of` neighbouring inputs, among those alive.

    A weight whose inputs are no multiple, or that has none, stays as it is.
    """
    masks = {}
    for name, value in score.items():
        if value.dim() < 2 or value.shape[1] % of:
            masks[name] = alive[name].clone()
            continue
        living = torch.where(alive[name], value, -torch.inf)
        groups = living.movedim(1, -1).reshape(-1, of)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(1, groups.argsort(dim=1, descending=True, stable=True)[:, :n], True)
        moved = living.movedim(1, -1).shape
        masks[name] = kept.reshape(moved).movedim(-1, 1) & alive[name]
    return masks


def unanimous(scores: Sequence[Scores]) -> dict[str, Tensor]:
    """One score from one a task: the highest of its ranks (0-1), so that a weight goes when every task ranks it low.

    Source: Sun et al., "DiSparse: Disentangled Sparsification for Multitask Model Compression", CVPR 2022; there tasks
    keep their own best share each and the network the union, here that share is the one that makes the count exact.
    """
    names = list(scores[0])
    best = highest_rank(torch.stack([torch.cat([score[name].flatten() for name in names]) for score in scores]))
    parts = torch.split(best, [scores[0][name].numel() for name in names])
    return {name: part.reshape(scores[0][name].shape) for name, part in zip(names, parts, strict=True)}


def _units(score: Tensor, alive: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Of each that is kept or pruned at once: its score a weight (least if none lives), and its live weights."""
    living = blocks(alive, block, False)
    size = living.sum(1)
    total = torch.where(living, blocks(score, block, 0.0), 0.0).sum(1)
    return torch.where(size > 0, total / size.clamp_min(1), -torch.inf), size
