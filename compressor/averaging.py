"""Averages that a training ends with: of its weights (EMA), and of batch norm's statistics over its last steps."""

import torch
from torch import Tensor, nn

from compressor.bench import running_norms

SETTLING_SHARE, SETTLING_STEPS = 0.1, 20
"""The last steps of a training (this share of them, and no fewer than this number), in which weights hardly move any
more: batch norm's running statistics become the plain average over them. The usual exponential average sees about
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

    def write(self, module: nn.Module) -> None:
        """Put the averages in the place of a module's weights."""
        with torch.no_grad():
            for name, mean in self._means.items():
                module.get_parameter(name).copy_(mean)


class Settling:
    """Batch norm's momentum through a training: its own at first, a plain average's over the last steps."""

    def __init__(self, module: nn.Module, steps: int) -> None:
        self._norms = running_norms(module)
        self._momenta = [norm.momentum for norm in self._norms]
        self._from = max(0, steps - max(SETTLING_STEPS, round(SETTLING_SHARE * steps)))

    def before(self, step: int) -> None:
        """What holds in step 0, 1, ..."""
        if step >= self._from:
            for norm in self._norms:
                norm.momentum = 1 / (step - self._from + 1)

    def end(self) -> None:
        """Give every batch norm its own momentum back."""
        for norm, momentum in zip(self._norms, self._momenta, strict=True):
            norm.momentum = momentum
