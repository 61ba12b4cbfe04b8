"""Train what is left."""

from typing import Literal

from pydantic import Field

from compressor.bench import Bench, reestimate_batchnorm
from compressor.model import MultiTaskModel
from compressor.training import Training, train


class Finetune(Training):
    """Train all remaining weights (masked ones stay zero); batch norm is re-estimated if `calibrate_batches` > 0.

    Labels are used where a batch has them; a task without labels is distilled from the original network.
    """

    kind: Literal["finetune"]
    calibrate_batches: int = Field(ge=0, default=0)

    @property
    def train_steps(self) -> int:
        return self.steps

    def run(self, model: MultiTaskModel, bench: Bench) -> MultiTaskModel:
        model = model.clone()
        train(model, bench, self, "finetune", bench.seed)
        if self.calibrate_batches:
            reestimate_batchnorm(model.module, bench.calibration(self.calibrate_batches))
        return model
