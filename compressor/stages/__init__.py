"""Stages by name: each a frozen config that is its own behaviour."""

from typing import Annotated, Protocol

from pydantic import Field

from compressor.bench import Bench
from compressor.model import MultiTaskModel
from compressor.stages.finetune import Finetune
from compressor.stages.pathway import Pathway
from compressor.stages.prune import Prune
from compressor.stages.ticket import Ticket


class Stage(Protocol):
    """Takes a model, returns a new one; `kind` is its name in a recipe, `train_steps` what it costs."""

    kind: str

    @property
    def train_steps(self) -> int: ...

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel: ...


STAGES = {
    "prune": Prune,
    "ticket": Ticket,
    "finetune": Finetune,
    "pathway": Pathway,
}

AnyStage = Annotated[Prune | Ticket | Finetune | Pathway, Field(discriminator="kind")]
