"""Cut from the whole network what no task needs."""

from typing import Literal

import torch

from compressor.bench import Bench
from compressor.channels import Axis
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from profiles.settings import Settings

EXACT = 1e-4
"""Largest difference accepted in float32, relative to a task's largest answer; `extract` proved the cut in float64."""


class Pathway(Settings):
    """Remove, exactly, the channels that no task reads through a weight that is not zero.

    After a ticket, whole channels are often unread; this stage turns them into smaller layers. The pathways of single
    task sets are cut when artifacts are made, whether or not a recipe has this stage.
    """

    kind: Literal["pathway"]

    @property
    def train_steps(self) -> int:
        return 0

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The model without those channels.

        Raises:
            CompressError: the module's own code fixes the size of a layer that would shrink.
        """
        found = extract(model, [task.name for task in model.tasks])
        keep = {Axis(n, dim): torch.tensor(left) for n, dims in found.kept.items() for dim, left in dims.items()}
        smaller = model.clone()
        smaller.cut(keep)
        hint = "Leave the pathway stage out: each artifact is cut from the traced graph, where no size is fixed."
        try:
            with torch.no_grad():
                after, before = smaller.answers(*model.inputs), model.answers(*model.inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CompressError(f"The module's own code fixes a size that would change ({error}). {hint}") from error
        for name, answer in before.items():
            if not torch.allclose(after[name], answer, rtol=0, atol=EXACT * float(answer.abs().max())):
                raise CompressError(f"Cutting unread channels changed the answer of task '{name}'. {hint}")
        bench.progress.line(f"  pathway: {len(keep)} axes of {len(found.kept)} tensors became shorter")
        return smaller
