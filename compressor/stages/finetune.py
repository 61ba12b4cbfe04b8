"""Train what is left."""

from typing import ClassVar, Literal

from compressor.bench import Bench
from compressor.model import MultiTaskModel
from compressor.training import Training, train


class Finetune(Training):
    """Train all remaining weights (masked ones stay zero).

    Labels are used where a batch has them; a task without labels is distilled from the original network.
    """

    measures: ClassVar[bool] = False
    kind: Literal["finetune"]

    @property
    def training(self) -> Training:
        return self

    @property
    def train_steps(self) -> int:
        return self.steps

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        model = model.clone()
        train(model, bench, self, "finetune", bench.seed)
        return model
