"""Which weights a ticket keeps: the ones worth most, one by one, in blocks of outputs, or N of each M inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.ranks import highest_rank

Scope = Literal["global", "layer"]
Scores = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How kept weights may lie.

    Attributes:
        block: neighbouring outputs whose weights at one place are kept or pruned together (1: each alone).
        of: where not 0, `n` of each `of` neighbouring inputs are kept, at each output and kernel element.
    """

    block: int = 1
    n: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """"free", "4x1" for blocks of four outputs, "2:4" for two of four inputs.

        Raises:
            ValueError: none of these.
        """
        first, colon, second = text.partition(":")
        rows, times, columns = text.partition("x")
        if text == "free":
            return cls()
        if colon and first.isdigit() and second.isdigit() and 0 < int(first) < int(second):
            return cls(n=int(first), of=int(second))
        if times and rows.isdigit() and columns == "1" and int(rows) > 1:
            return cls(block=int(rows))
        raise ValueError("a pattern is 'free', blocks such as '4x1', or N of M such as '2:4'")

    def fits(self, weight_OI: Tensor) -> bool:
        """Whether a weight's outputs, or inputs, are whole multiples."""
        return weight_OI.shape[0] % self.block == 0 and (not self.of or weight_OI.shape[1] % self.of == 0)


def keep_most(
    score: Scores, alive: Scores, share: float, scope: Scope, block: int = 1
) -> dict[str, Tensor]:
    """Masks that keep `round(share * survivors)` of the weights that are alive, those of the highest scores.

    Among equal scores the earlier position is kept, so the count is exact; with blocks it is exact up to one block.
    A weight whose outputs are no multiple of the block is pruned one by one.
    """
    units = {name: _units(score[name], alive[name], block) for name in score}
    masks = {}
    for pool in [list(score)] if scope == "global" else [[name] for name in score]:
        value = torch.cat([units[name][0].flatten() for name in pool])
        size = torch.cat([units[name][1].flatten() for name in pool])
        keep = round(share * int(size.sum()))
        order = value.argsort(descending=True, stable=True)
        flat = torch.zeros_like(value, dtype=torch.bool)
        flat[order[size[order].cumsum(0) <= keep]] = True
        for name, part in zip(pool, torch.split(flat, [units[name][0].numel() for name in pool]), strict=True):
            shape, rows = score[name].shape, score[name].shape[0] // len(units[name][0])
            kept = part.reshape(units[name][0].shape).repeat_interleave(rows, 0)
            masks[name] = kept.reshape(shape) & alive[name]
    return masks


def keep_n_of_m(score: Scores, alive: Scores, n: int, of: int) -> dict[str, Tensor]:
    """Masks that keep the `n` highest scores of each `of` neighbouring inputs, among those alive.

    A weight whose inputs are no multiple stays as it is.
    """
    masks = {}
    for name, value in score.items():
        if value.shape[1] % of:
            masks[name] = alive[name].clone()
            continue
        living = torch.where(alive[name], value, -1.0)
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


def _units(score: Tensor, alive: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) of what is kept or pruned at once: its score a weight (-1 if none is alive), its live weights."""
    block = block if score.shape[0] % block == 0 else 1
    living = alive.reshape(len(score) // block, block, -1)
    count = living.sum(1)
    total = torch.where(living, score.reshape(living.shape), 0.0).sum(1)
    return torch.where(count > 0, total / count.clamp_min(1), -1.0), count
