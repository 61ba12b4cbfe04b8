"""How fast a network is on the device, while it is being compressed: built, timed or simulated, beside the original."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from compressor import compute
from compressor.export import to_program
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from compressor.quantization.calibrate import roughly
from compressor.store import writing
from profiles.device import Device
from profiles.measure import interleave, ratio
from targets.base import Artifact, Runner, Target
from targets.records import NONE, Records

MEASURED = "measured.json"
_SECONDS, _SAMPLES, _WARMUP_SECONDS = 3.0, 64, 0.3


Measure = Callable[[MultiTaskModel], float]
"""A model's latency on the device as a share of the original's."""


def replayed(measure: Measure, folder: Path) -> Measure:
    """What is measured in turn is kept in the folder, and a stage that is run again in it is told the same in turn.

    So one that was killed comes by the same networks as before, whose trainings it can go on with. Of several processes
    the first measures, and tells the others.
    """
    file, asked = folder / MEASURED, count()

    def ask(model: MultiTaskModel) -> float:
        known = json.loads(file.read_text()) if file.is_file() else []
        turn = next(asked)
        if turn >= len(known):
            known = [*known[:turn], measure(model)]
            draft = file.with_suffix(".draft")
            with writing(file):
                folder.mkdir(parents=True, exist_ok=True)
                draft.write_text(json.dumps(known))
                draft.replace(file)
        return float(known[turn])

    return lambda model: compute.by_first(lambda: ask(model))


@dataclass
class Speed:
    """Times whole networks, all tasks together, as the target builds them for the device; one input, example values.

    Where the device is simulated its own time is told instead, such as an accelerator's cycles without its host's
    work. A target that computes integers gets the network on grids that its example inputs alone say.

    Attributes:
        threads: of every inference.
    """

    original: MultiTaskModel
    target: Target
    device: Device
    threads: int
    seed: int
    records: Records = field(default_factory=lambda: NONE)
    _dense: Runner | float | None = field(default=None, init=False)

    def __call__(self, model: MultiTaskModel) -> float:
        """The model's latency over the original's, both on the device: of times the median of interleaved pairs.

        Raises:
            TargetError: as `ready`.
        """
        dense, own = self.ready(), self._built(model)
        if isinstance(dense, float) or isinstance(own, float):
            assert isinstance(dense, float) and isinstance(own, float)
            return own / dense
        arrays = [tensor.numpy() for tensor in model.inputs]
        seen = interleave(
            {"own": lambda: own(*arrays), "dense": lambda: dense(*arrays)},
            warmup_s=_WARMUP_SECONDS, min_samples=_SAMPLES, max_seconds=_SECONDS, seed=self.seed,
        )
        return ratio(seen["own"], seen["dense"]).value

    def ready(self) -> Runner | float:
        """The original, built; the first call builds it.

        Raises:
            TargetError: this machine cannot run what is built for the device.
        """
        if self._dense is None:
            self._dense = self._built(self.original)
        return self._dense

    def _built(self, model: MultiTaskModel) -> Runner | float:
        """What runs it, or the milliseconds that the simulator tells."""
        if self.target.integers and model.quantization is None:
            model = roughly(model)
        program = to_program(extract(model, [task.name for task in model.tasks]), model.inputs)[1]
        with tempfile.TemporaryDirectory(prefix="taskpress-") as folder:
            plan = self.target.plan(program, self.device, self.records)
            built: Artifact = self.target.build(plan, Path(folder) / "network", {}, {})
            told = self.target.simulated(built)
            return self.target.load(built, self.threads) if told is None else told.latency_ms
