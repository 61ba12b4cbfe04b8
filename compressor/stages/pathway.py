"""Cut from the whole network what no task needs."""

from typing import ClassVar, Literal

from compressor.bench import Bench
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.model import MultiTaskModel
from compressor.pathway import needed
from compressor.trace import trace
from profiles.settings import Settings


class Pathway(Settings):
    """Remove, exactly, the channels that no task reads through a weight that is not zero.

    After a ticket, whole channels are often unread; this stage turns them into smaller layers. The pathways of single
    task sets are cut when artifacts are made, whether or not a recipe has this stage.
    """

    measures: ClassVar[bool] = False
    training: ClassVar[None] = None
    kind: Literal["pathway"]

    @property
    def train_steps(self) -> int:
        return 0

    def check(self, model: MultiTaskModel, bench: Bench) -> None:
        """It takes any model."""

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        """The model without those channels.

        Raises:
            CompressError: the module's own code fixes the size of a layer that would shrink.
        """
        prunable = Prunable.of(model)
        need = needed(trace(model), prunable.channels)
        shorter = prunable.kept(need)
        try:
            smaller = prunable.cut(model, need)
        except CompressError as error:
            raise CompressError(
                f"{str(error).rstrip('.')}. Leave the pathway stage out: each artifact is cut from the traced graph, "
                "where no size is fixed."
            ) from error
        tensors = {axis.tensor for axis in shorter}
        bench.progress.line(f"  pathway: {len(shorter)} axes of {len(tensors)} tensors became shorter")
        return smaller
