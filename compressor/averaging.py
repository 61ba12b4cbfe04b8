"""Averages that a training hands back: of its weights (EMA), and of batch norm's statistics over the steps before."""

import torch
from torch import Tensor, nn

from compressor.bench import running_norms

SETTLING_SHARE, SETTLING_STEPS = 0.1, 20
"""The last steps of a training, or of those between two checks (this share of them, and no fewer than this number):
batch norm's running statistics become the plain average over them. The usual exponential average sees about
twenty batches, too few for layers whose pictures are only a few pixels large, and scores then depend on which batches
came last (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3)."""


class Average:
    """The exponential moving average of a module's weights; none where `decay` is 0.

    It starts without a bias: after t steps the newest weights count (1 - decay) / (1 - decay^t) (Kingma and Ba, "Adam",
    ICLR 2015, section 3), so the first are taken whole. Masked weights stay exactly zero.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad and decay}
        self._means = {name: p.detach().clone() for name, p in self._weights.items()}

    def state(self) -> dict[str, Tensor]:
        """The averages by name; to be changed in place."""
        return {f"average.{name}": mean for name, mean in self._means.items()}

    def add(self, step: int) -> None:
        """Count in the weights as they are after step 0, 1, ..."""
        share = (1 - self._decay) / (1 - self._decay ** (step + 1))
        with torch.no_grad():
            for name, mean in self._means.items():
                mean.lerp_(self._weights[name], share)

    def write(self, module: nn.Module) -> bool:
        """Put the averages in the place of a module's weights; whether there are any."""
        with torch.no_grad():
            for name, mean in self._means.items():
                module.get_parameter(name).copy_(mean)
        return bool(self._means)


class Settling:
    """Batch norm's momentum in a training: a plain average's before the end and before each check, else its own.

    Where a check comes shortly before the end, the last average begins at the check before that one.
    """

    def __init__(self, module: nn.Module, steps: int, check_every: int) -> None:
        self._norms = running_norms(module)
        self._momenta = [norm.momentum for norm in self._norms]
        self._every = check_every or max(1, steps)
        last_check = (steps - 1) // self._every * self._every
        start = max(0, steps - _length(steps))
        self._last = start if last_check <= start else start // self._every * self._every

    def before(self, step: int) -> None:
        """What holds in step 0, 1, ..."""
        done = step // self._every * self._every
        start = self._last if step >= self._last else max(done, done + self._every - _length(self._every))
        for norm, own in zip(self._norms, self._momenta, strict=True):
            norm.momentum = 1 / (step - start + 1) if step >= start else own

    def end(self) -> None:
        """Give every batch norm its own momentum back."""
        for norm, momentum in zip(self._norms, self._momenta, strict=True):
            norm.momentum = momentum


def _length(steps: int) -> int:
    """How many of so many steps are averaged over."""
    return max(SETTLING_STEPS, round(SETTLING_SHARE * steps))
