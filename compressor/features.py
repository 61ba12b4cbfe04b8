"""What a network's layers hand on, beside what the original's do: distillation that reaches every layer by a short way.

Source: hints from a teacher's layers, Romero et al., "FitNets", ICLR 2015; here pupil and teacher have the same layers,
so that no adapter is needed, and a pruned layer is compared at the channels that it kept.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.saliency import NORMS

_TURNED = nn.modules.conv._ConvTransposeNd  # whose weights' first dimension is their inputs
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)  # their channels are the last dimension, others' the second


class Features:
    """What layers answer while it is open, in both networks; `gap()` then tells how far they are apart.

    Layers are the norms; the convolutions (transposed ones apart) and linear layers of a network that has none. Those
    that a network's own forward does not call, or that were cut in another way than by their outputs, are left out.

    Raises:
        CompressError: no layer can be compared.
    """

    def __init__(self, model: MultiTaskModel, original: MultiTaskModel) -> None:
        if model.quantization is not None:
            raise CompressError("'features' compares layers, and a quantized network is trained as one graph.")
        teachers = dict(original.module.named_modules())
        kinds: tuple[type[nn.Module], ...] = NORMS
        if not any(isinstance(layer, NORMS) for layer in model.module.modules()):
            kinds = (nn.modules.conv._ConvNd, nn.Linear)
        self._pairs: list[tuple[nn.Module, nn.Module, Tensor | None, int]] = []
        for name, layer in model.module.named_modules():
            if isinstance(layer, kinds) and not isinstance(layer, _TURNED) and name in teachers:
                kept = model.kept.get(f"{name}.weight".lstrip("."), {}).get(0)
                dim = -1 if isinstance(layer, _LAST) else 1
                self._pairs.append((layer, teachers[name], None if kept is None else torch.tensor(kept), dim))
        self._seen: dict[nn.Module, list[Tensor]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        hooked = {layer for pair in self._pairs for layer in pair[:2]}
        self._hooks = [layer.register_forward_hook(self._see) for layer in hooked]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:  # a clone of the network must not carry them
            hook.remove()

    def _see(self, layer: nn.Module, given: object, answer: Tensor) -> None:
        self._seen.setdefault(layer, []).append(answer)

    def gap(self, apart: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean over layers of `apart(answer, taught)`, in fp32; forgets what was seen."""
        found = []
        for layer, teacher, kept, dim in self._pairs:
            for answer, taught in zip(self._seen.pop(layer, []), self._seen.pop(teacher, []), strict=False):
                wanted = taught if kept is None else taught.index_select(dim, kept.to(taught.device))
                if answer.shape == wanted.shape:
                    found.append(apart(answer.float(), wanted.float()))
        self._seen.clear()
        if not found:
            raise CompressError("'features': no layer of this network can be compared with the original's.")
        return torch.stack(found).mean()
