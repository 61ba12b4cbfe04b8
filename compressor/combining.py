"""What a channel is worth to all tasks together, from what it is worth to each."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.ranks import highest_rank

Combine = Literal["max", "sum", "unanimous"]


def combine(
    score_TC: Tensor, tasks: list[str], bench: Bench, how: Combine, weights: Mapping[str, float] = {}
) -> Tensor:
    """(class,) one value a channel from one row a task: rows sum to 1, then weigh as their tasks need protection.

    Ranks, for "unanimous", run from 0 to 1 and are equal for equal scores.

    A task weighs as its budget is tight relative to its score, by the square root: the first channels cost a task
    little and the last ones much, so the share of its importance that it can spare grows slower than its budget. One
    without a budget weighs as one with a budget of 100 %. What a round has lost of a budget does not count: after a
    short recovery it says which metric is slow to come back, not which task lacks channels. `weights` are factors
    beside that.
    """
    if how == "unanimous":
        return highest_rank(score_TC)
    scaled_TC = score_TC / score_TC.sum(1, keepdim=True).clamp_min(1e-30)
    weight_T = torch.tensor([weights.get(task, 1.0) * _relative_budget(bench, task) ** -0.5 for task in tasks])
    scaled_TC = scaled_TC * (weight_T / weight_T.max())[:, None]
    return scaled_TC.max(0).values if how == "max" else scaled_TC.sum(0)


def _relative_budget(bench: Bench, task: str) -> float:
    before = abs(bench.before.get(task, 0.0))
    if task not in bench.budgets:
        return 1.0
    allowed = bench.budgets[task].allowed(before)
    return min(1.0, max(allowed / before if before else float(allowed > 0), 1e-4))
