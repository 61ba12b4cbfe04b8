"""Time the kernels an artifact could be made of, and make it of the fastest."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from compressor.checks import verify_artifact
from compressor.progress import Reporter
from targets import artifact as artifacts
from targets import records
from targets.base import Artifact, BuildPlan, Program
from targets.profiling import kernels
from targets.records import Records
from targets.registry import target as find_target
from targets.tune import choices_of, tune, waiting


@dataclass(frozen=True, slots=True)
class Tuned:
    """One layer that was measured: seconds of what would be used untuned and of what is used now."""

    layer: str
    before: str
    before_s: float | None
    after: str
    after_s: float


def tune_artifact(folder: Path, seconds: float, progress: Reporter, inputs: int = 4) -> list[Tuned]:
    """Time the kernels of one artifact and build it again, in its place, from the fastest.

    The new one is verified against ONNX Runtime before it takes the old one's place; its `kernels.json` holds the
    times, so that tuning goes on where it stopped.

    Raises:
        TargetError: the folder does not match its manifest, is for another machine, or nothing in it can be tuned.
        CompressError: what was built answers otherwise than ONNX Runtime.
    """
    built = artifacts.read(folder)
    known = kernels(built).records
    measured, tuned = _measured([_plan(built, known)], known, seconds, progress)
    plan = _plan(built, measured)
    if plan.digest() == built.manifest.plan:
        return tuned
    own = {artifacts.MODEL, artifacts.KERNELS, artifacts.LIBRARY, artifacts.LOADER}
    extra = {name: (folder / name).read_bytes() for name in built.manifest.files if name not in own}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.resolve().parent) as place:
        draft = Path(place) / folder.name
        find_target(built.manifest.target).build(plan, draft, extra, built.manifest.about)
        verify_artifact(draft, inputs)
        with artifacts.staged(folder) as final:
            shutil.copytree(draft, final, dirs_exist_ok=True)
    return tuned


def tune_artifacts(built: Sequence[Artifact], seconds: float, file: Path, progress: Reporter) -> list[Tuned]:
    """Time the kernels of several artifacts for one device and add the times to a records file."""
    device = built[0].manifest.device
    known = records.read(file, device)
    measured, tuned = _measured([_plan(one, known) for one in built], known, seconds, progress)
    records.write(file, device, measured)
    return tuned


def _measured(
    plans: Sequence[BuildPlan], known: Records, seconds: float, progress: Reporter
) -> tuple[Records, list[Tuned]]:
    found = {layer: dict(times) for layer, times in known.items()}
    for timed in progress.track(tune(plans, seconds), "timing kernels", waiting(plans)):
        found.setdefault(timed.layer, {})[timed.candidate] = timed.seconds
    tuned = {}
    for plan in plans:
        for layer, choice in choices_of(plan).made.items():
            names = {candidate.name for candidate in choice.candidates}  # an older version's may be in the records
            if times := {name: time for name, time in found.get(layer, {}).items() if name in names}:
                untuned = min(choice.candidates, key=lambda c: c.cycles).name
                fastest = min(times, key=lambda name: times[name])
                tuned[layer] = Tuned(layer, untuned, times.get(untuned), fastest, times[fastest])
    return found, list(tuned.values())


def _plan(built: Artifact, known: Records) -> BuildPlan:
    manifest = built.manifest
    model = onnx.load_model_from_string((built.directory / artifacts.MODEL).read_bytes())
    program = Program(manifest.program, model, manifest.tasks, manifest.normalisation)
    return find_target(manifest.target).plan(program, manifest.device, known)
