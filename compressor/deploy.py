"""From a compressed model to verified artifacts: one for each task set."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors
from torch import Tensor

from compressor.bench import Bench
from compressor.export import to_program
from compressor.model import SURGERY, WEIGHTS, MultiTaskModel
from compressor.pathway import Pathway, extract
from compressor.store import Store, key_of, writing
from compressor.verify import Answer, Compared, climb
from profiles.device import Device
from profiles.measure import Emulated, Estimate
from targets import artifact as artifacts
from targets.base import Artifact, Program, Runner, Target
from targets.errors import TargetError
from targets.lower import reference
from targets.records import NONE, Records


@dataclass(frozen=True, slots=True)
class Deployed:
    """One built artifact.

    Attributes:
        verified: what the ladder compared; without the rung "artifact" when this machine cannot run the artifact.
        unverified: then, why it cannot; empty otherwise.
        simulated: the latency of an artifact that runs here on a simulator; None of one that is to be timed.
    """

    pathway: Pathway
    program: Program
    artifact: Artifact
    parameters: int
    nonzero_parameters: int
    compile_s: float
    verified: tuple[Compared, ...]
    unverified: str
    simulated: Emulated | Estimate | None
    resumed: bool

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run the artifact, so that its own answers were verified."""
        return not self.unverified

    @property
    def timed_here(self) -> bool:
        """Whether this machine can tell how long the artifact takes."""
        return self.runs_here and self.simulated is None


def deploy(
    model: MultiTaskModel,
    tasks: tuple[str, ...],
    target: Target,
    device: Device,
    bench: Bench,
    store: Store,
    inputs: int,
    records: Records = NONE,
) -> Deployed:
    """Cut, export, plan, build and verify one task set's artifact; only then does it become `artifacts/<name>`.

    `records` are measured times of the device's kernels, where there are any.

    A folder that already holds the artifact of the same plan is kept, and so is the proof that it was verified.

    Raises:
        CompressError, TargetError: whatever of these steps failed; the artifact that failed is gone.
    """
    pathway = extract(model, tasks)
    exported, program = to_program(pathway, model.inputs, bench.workload.normalisation)
    plan = target.plan(program, device, records)
    final = store.directory / "artifacts" / program.name
    sizes = (pathway.parameters(model), nonzero(pathway, model))
    key = key_of(plan.digest(), inputs)
    proof = store.facts("verified", key)
    built = _already(final, plan.digest())
    if proof is not None and built is not None:
        verified, unverified = tuple(Compared(**row) for row in proof["verified"]), proof["unverified"]
        if not unverified or _load(target, built)[0] is None:
            told, seconds = target.simulated(built), proof["compile_s"]
            return Deployed(pathway, program, built, *sizes, seconds, verified, unverified, told, resumed=True)
    with writing(final):
        final.parent.mkdir(exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        begun = time.monotonic()
        built = target.build(plan, draft, _files(model, pathway), _about(pathway, sizes, bench))
        facts: dict[str, Any] = {"compile_s": time.monotonic() - begun}
        runner, unverified = _load(target, built)
        verified = tuple(_verify(model, pathway, (exported, program), runner, target, device, bench, inputs))
        facts |= {"verified": [asdict(row) for row in verified], "unverified": unverified}
        with writing(final):
            if final.exists():
                shutil.rmtree(final)
            draft.rename(final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    with store.entry("verified", key, facts):
        pass
    built = artifacts.read(final)
    told = target.simulated(built)
    return Deployed(pathway, program, built, *sizes, facts["compile_s"], verified, unverified, told, resumed=False)


def _already(directory: Path, plan: str) -> Artifact | None:
    """The artifact in a folder if it is whole and was built from this plan."""
    if not directory.is_dir():
        return None
    try:
        found = artifacts.read(directory)
    except TargetError:
        return None
    return found if found.manifest.plan == plan else None


def _load(target: Target, built: Artifact) -> tuple[Runner | None, str]:
    """An artifact's runner, or why this machine cannot run it."""
    try:
        return target.load(built, threads=1), ""
    except TargetError as error:
        return None, str(error)


def _verify(
    model: MultiTaskModel,
    pathway: Pathway,
    programs: tuple[Program, Program],
    built: Runner | None,
    target: Target,
    device: Device,
    bench: Bench,
    count: int,
) -> list[Compared]:
    def partial(program: Program) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            part = target.build(target.plan(program, device), Path(folder) / "part", {}, {})
            return target.load(part, threads=1)

    return climb(model, pathway, programs, real_inputs(model, bench, count), reference, partial, built)


def real_inputs(model: MultiTaskModel, bench: Bench, count: int) -> list[tuple[Tensor, ...]]:
    """Up to `count` inputs of the artifact's static shape from the validate split; example inputs where it is empty."""
    found: list[tuple[Tensor, ...]] = []
    size = model.inputs[0].shape[0]
    for batch in bench.validation:
        rows = batch.inputs[0].shape[0]
        for first in range(0, min(rows, 2 * size) - size + 1, size):  # two a batch, to spread over the split
            taken = tuple(x[first : first + size].contiguous() for x in batch.inputs)
            if all(t.shape == e.shape for t, e in zip(taken, model.inputs, strict=True)):
                found.append(taken)
            if len(found) == count:
                return found
    return found or [model.inputs]


def nonzero(pathway: Pathway, model: MultiTaskModel) -> int:
    """How many of a pathway's trained values are not zero."""
    trained = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    return sum(int((tensor != 0).sum()) for name, tensor in pathway.tensors.items() if name in trained)


def _files(model: MultiTaskModel, pathway: Pathway) -> dict[str, bytes]:
    """Weights under their original names, and what was cut, relative to the network as it was brought."""
    record: dict[str, dict[str, list[int]]] = {}
    for name, tensor in pathway.tensors.items():
        for dim in range(tensor.dim()):
            before = model.kept.get(name, {}).get(dim)
            now = pathway.kept.get(name, {}).get(dim)
            if now is not None:
                record.setdefault(name, {})[str(dim)] = [before[k] for k in now] if before is not None else list(now)
            elif before is not None:
                record.setdefault(name, {})[str(dim)] = list(before)
    surgery = json.dumps({"schema": "taskpress.surgery/1", "kept": record}).encode()
    weights = to_safetensors({name: tensor.detach().clone().contiguous() for name, tensor in pathway.tensors.items()})
    return {WEIGHTS: weights, SURGERY: surgery}


def _about(pathway: Pathway, sizes: tuple[int, int], bench: Bench) -> Mapping[str, Any]:
    metrics = {t.name: {"metric": t.metric, "higher_is_better": t.higher_is_better} for t in bench.original.tasks}
    return {
        "macs": pathway.macs,
        "parameters": sizes[0],
        "nonzero_parameters": sizes[1],
        "metrics": {name: metrics[name] for name in pathway.tasks},
    }
