"""Ids of channels: tensors of them, and the union-find that says which ids are one class."""

import torch
from torch import Tensor

FIXED = 0
"""The id of everything that must stay: network inputs, outputs, and channels mixed by an operator not understood."""


class Classes:
    """A union-find over ids in which FIXED absorbs whatever is merged with it.

    Attributes:
        fixed: how many classes it has absorbed so far.
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.int64)
        self.fixed = 0

    def fresh(self, count: int) -> Tensor:
        """New ids, each its own class."""
        made = torch.arange(len(self._parent), len(self._parent) + count)
        self._parent = torch.cat([self._parent, made])
        return made

    def root(self, ids: Tensor) -> Tensor:
        """The class of each id; repeats stay repeats (stride 0)."""
        given = roots = distinct(ids)
        while not torch.equal(above := self._parent[roots], roots):
            roots = above
        self._parent[given] = roots  # the next look is one step
        return roots.expand(ids.shape)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Make each pair of ids one class, element by element (same shape)."""
        for dim in range(left.dim()):
            if left.stride(dim) == 0 == right.stride(dim) and left.shape[dim] > 1:
                left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
        pairs = self.root(left).reshape(-1) * len(self._parent) + self.root(right).reshape(-1)
        parent = self._parent.numpy()

        def find(item: int) -> int:
            while parent[item] != item:
                item = int(parent[item])
            return item

        for pair in torch.unique(pairs).tolist():
            low, high = sorted(map(find, divmod(pair, len(parent))))
            self.fixed += low == FIXED < high
            parent[high] = low  # FIXED is the lowest, so it always wins

    def fix(self, ids: Tensor) -> None:
        """Everything with one of these ids stays."""
        flat = torch.unique(distinct(ids))
        self.merge(flat, torch.full_like(flat, FIXED))

    def along(self, ids: Tensor, dim: int) -> Tensor | None:
        """One class for each index of `dim` when all elements of that index agree; otherwise None."""
        rows = distinct(self.root(ids).movedim(dim, 0)[:, None], keep=1).flatten(1)
        first = rows[:, 0] if rows.shape[1] else rows.new_zeros(rows.shape[0])
        return first if bool((rows == first[:, None]).all()) else None

    def tie(self, ids: Tensor, dim: int) -> Tensor:
        """One class for each index of `dim`: whatever meets at an index is merged."""
        rows = distinct(self.root(ids).movedim(dim, 0)[:, None], keep=1).flatten(1)
        if not rows.shape[1]:
            return torch.full((len(rows),), FIXED)
        first = rows[:, :1]
        self.merge(first.expand(rows.shape).contiguous(), rows.contiguous())
        return self.root(first.flatten())


def whole(shape: tuple[int, ...]) -> Tensor:
    """Ids of a value that stays as it is."""
    return torch.full((), FIXED, dtype=torch.int64).expand(shape)


def spread(along: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    """Repeat one id for each index of `dim` over a whole shape, without memory."""
    view = [1] * len(shape)
    view[dim] = len(along)
    return along.reshape(view).expand(shape)


def distinct(ids: Tensor, keep: int = 0) -> Tensor:
    """Drop the repeats of an expanded tensor (stride 0), from dimension `keep` on."""
    for dim in range(keep, ids.dim()):
        if ids.stride(dim) == 0 and ids.shape[dim] > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def compact(ids: Tensor) -> Tensor:
    """The same ids with every dimension in which they only repeat at stride 0."""
    small = ids
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and not varies(small, dim):
            small = small.narrow(dim, 0, 1)
    return small.contiguous().expand(ids.shape)


def varies(ids: Tensor, dim: int) -> bool:
    """Do two indices of `dim` differ anywhere?"""
    if ids.shape[dim] <= 1 or ids.stride(dim) == 0:
        return False
    return not bool((ids == ids.narrow(dim, 0, 1)).all())
