"""Stages by name: each a frozen config that is its own behaviour."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from compressor.bench import Bench
from compressor.model import MultiTaskModel
from compressor.stages.finetune import Finetune
from compressor.stages.pathway import Pathway
from compressor.stages.prune import Prune
from compressor.stages.quantize import Quantize
from compressor.stages.ticket import Ticket
from compressor.training import Training
from profiles.settings import Settings


@runtime_checkable
class Stage(Protocol):
    """Takes a model, returns a new one.

    `kind` is its name in a recipe, `training` how it trains, where it does, `train_steps` what it trains in all if all
    goes well, `measures` whether it asks for latencies on the device.

    `check` refuses, before the first stage runs, what the model as it was brought, its tasks and budgets do not allow.

    A stage is a `profiles.settings.Settings`: its settings are checked when the recipe is read, and decide with the
    code whether stored work is still good.
    """

    @property
    def kind(self) -> str: ...
    @property
    def training(self) -> Training | None: ...
    @property
    def train_steps(self) -> int: ...
    @property
    def measures(self) -> bool: ...
    def model_dump(self) -> dict[str, Any]: ...
    def check(self, model: MultiTaskModel, bench: Bench) -> None: ...
    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel: ...


STAGES: Mapping[str, type[Settings]] = {
    "prune": Prune,
    "ticket": Ticket,
    "finetune": Finetune,
    "pathway": Pathway,
    "quantize": Quantize,
}
