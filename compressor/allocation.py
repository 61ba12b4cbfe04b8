"""Which channels stay, for a goal in multiply-adds and parameters: widths by value for cost, or all alike."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.costs import Costs, Ledger
from compressor.groups import Group, Prunable


def cheapest(
    prunable: Prunable, groups: Sequence[Group], value_C: Tensor, goal: Costs, multiple: int, floors: Mapping[str, int]
) -> Tensor:
    """Bool by class: greedily drop the vector-wide slice of channels with the least value for the cost it saves.

    The slice that reaches the goal may go far past it, as a head of every block does. So the walk then goes on without
    it, as long as less value is lost than with it.
    """
    ledger = Ledger(prunable)
    full = ledger.now
    value, left = value_C.tolist(), ranking(groups, value_C)
    steps = {g.name: g.step(multiple) for g in groups}
    terms = {g.name: ledger.touching(left[g.name]) for g in groups}
    offers: dict[str, tuple[float, Costs, list[int]]] = {}
    stale, allowed = set(left), dict.fromkeys(left)
    lost, least, found = 0.0, float("inf"), None
    while wanted := [k for k in (0, 1) if ledger.now[k] > goal[k]]:
        for name in stale & allowed.keys():
            dropped = last_slice(left[name], steps[name], floors[name])
            offers.pop(name, None)
            if dropped:
                offers[name] = sum(value[identity] for identity in dropped), ledger.saving(dropped), dropped

        def price(name: str) -> float:
            worth, saved, _ = offers[name]
            return worth / max(sum(saved[k] / full[k] for k in wanted), 1e-30)

        best = min((name for name in allowed if name in offers), key=price, default=None)
        if best is None:
            break
        enough = [n for n in allowed if n in offers and all(ledger.now[k] - offers[n][1][k] <= goal[k] for k in wanted)]
        if enough and offers[last := min(enough, key=lambda n: offers[n][0])][0] <= offers[best][0]:
            best = last  # one more slice will do, so its cost does not matter any more
        worth, _, dropped = offers[best]
        if best in enough:
            if lost + worth < least:
                least, found = lost + worth, left | {best: left[best][: -len(dropped)]}
            del allowed[best], offers[best]
            stale = set()
            continue
        lost += worth
        if lost >= least:
            break
        ledger.drop(dropped)
        left[best] = left[best][: -len(dropped)]
        stale = {name for name in left if terms[name] & terms[best]}
    return kept(prunable, groups, found or left)


def uniform(
    prunable: Prunable, groups: Sequence[Group], value_C: Tensor, goal: Costs, multiple: int, floors: Mapping[str, int]
) -> Tensor:
    """Bool by class: every group keeps the same share of its channels, those of most value; the largest that will do.

    Widths are rounded up to the multiple; where even the floors do not meet the goal, the floors.
    """
    ranked, steps = ranking(groups, value_C), {g.name: g.step(multiple) for g in groups}

    def at(share: float) -> Tensor:
        left = {}
        for name, classes in ranked.items():
            width = -(-max(1, round(share * len(classes))) // steps[name]) * steps[name]
            left[name] = classes[: min(len(classes), max(width, floors[name]))]
        return kept(prunable, groups, left)

    def meets(share: float) -> bool:
        return all(now <= wanted for now, wanted in zip(prunable.cost(at(share)), goal, strict=True))

    if meets(1.0):
        return at(1.0)
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return at(low)


def ranking(groups: Sequence[Group], value_C: Tensor) -> dict[str, list[int]]:
    """Each group's classes by name, those of most value first."""
    value = value_C.tolist()
    return {g.name: sorted(g.classes.tolist(), key=lambda identity: value[identity], reverse=True) for g in groups}


def kept(prunable: Prunable, groups: Sequence[Group], left: Mapping[str, Sequence[int]]) -> Tensor:
    """Bool by class: what is left of the named groups, and all that is in none."""
    keep = prunable.keep_all()
    for group in groups:
        keep[group.classes] = False
        keep[torch.tensor(left[group.name], dtype=torch.int64)] = True
    return keep


def last_slice(left: list[int], multiple: int, floor: int) -> list[int]:
    """The least valuable channels to drop to reach the next multiple; none when that is below `floor`."""
    count = len(left) % multiple or multiple
    return left[-count:] if len(left) - count >= floor else []
