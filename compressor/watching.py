"""A training that is watched: scored every so many steps, stopped when it has won enough, handed back at its best."""

import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.model import MultiTaskModel

_MEASURABLE = 1e3  # a share of a budget beyond which there is none


class Watch:
    """Keeps the state whose worst task had the largest share of its budget left, of those that were looked at.

    Attributes:
        over: whether the training may stop.
    """

    def __init__(
        self, model: MultiTaskModel, bench: Bench, steps: int, every: int, enough: float | None, patience: int
    ) -> None:
        self._bench, self._steps, self._every, self._enough, self._patience = bench, steps, every, enough, patience
        self._best = {name: value.cpu().clone() for name, value in model.module.state_dict().items() if every}
        self._left = torch.tensor(-float("inf"), dtype=torch.float64)
        self._at, self._since, self._stopped = (torch.zeros((), dtype=torch.int64) for _ in range(3))

    def state(self) -> dict[str, Tensor]:
        """Everything that later checks depend on, by name; to be changed in place."""
        counts = {"left": self._left, "at": self._at, "since": self._since, "stopped": self._stopped}
        kept = {f"best.{name}": value for name, value in self._best.items()}
        return {f"watch.{name}": value for name, value in (kept | counts).items()} if self._every else {}

    @property
    def over(self) -> bool:
        return bool(self._stopped)

    def due(self, done: int) -> bool:
        """Whether to look after so many steps: every so many, and when the last is done."""
        return bool(self._every) and (done % self._every == 0 or done == self._steps)

    def look(self, candidate: MultiTaskModel, done: int, may_stop: bool) -> dict[str, float]:
        """Score what would be handed back after so many steps; the share of its budget that each task has left."""
        shares = self._bench.shares(self._bench.scores(candidate))
        left = min(shares.values())
        if left > self._left:
            self._left.fill_(left)
            self._at.fill_(done)
            self._since.zero_()
            for name, value in candidate.module.state_dict().items():
                self._best[name].copy_(value)
        else:
            self._since += 1
        won = self._enough is not None and left >= self._enough
        if may_stop and done < self._steps and (won or 0 < self._patience <= self._since):
            self._stopped.fill_(done)
        return shares

    def end(self, model: MultiTaskModel, title: str) -> None:
        """Give the model the best state that was seen, and say so where that is not the last."""
        if not self._every or not self._at:
            return
        model.module.load_state_dict(self._best)
        best, stopped = int(self._at), int(self._stopped)
        share = float(self._left)
        left = f"the task nearest its end had {share:.0%} of its budget left"
        if abs(share) > _MEASURABLE:
            left = f"the task nearest its end {'gained' if share > 0 else 'lost'}, where nothing may be lost"
        if stopped:
            self._bench.note(f"{title} stopped after {stopped} of {self._steps} steps; its weights are those of step "
                             f"{best}, where {left}.")  # fmt: skip
        elif best < self._steps:
            self._bench.note(f"{title} kept its weights of step {best} of {self._steps}, where {left}.")
