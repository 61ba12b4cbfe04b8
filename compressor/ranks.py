"""Scores of several tasks made one by their order alone."""

import torch
from torch import Tensor


def highest_rank(score_TN: Tensor) -> Tensor:
    """(N,) the highest of each column's ranks among its row's scores: 0 for the least, 1 for the most, ties alike.

    What is low by it is low to every task, whatever the units of their scores.
    """
    ranks = [torch.unique(row_N, return_inverse=True)[1].float() for row_N in score_TN]
    return torch.stack([rank / rank.max().clamp_min(1) for rank in ranks]).max(0).values
