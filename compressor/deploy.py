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
from compressor.store import Store
from compressor.verify import Answer, Compared, climb
from profiles.device import Device
from targets import artifact as artifacts
from targets.base import Artifact, Program, Target
from targets.errors import TargetError
from targets.lower import reference


@dataclass(frozen=True, slots=True)
class Deployed:
    """One built and verified artifact."""

    pathway: Pathway
    program: Program
    artifact: Artifact
    parameters: int
    nonzero_parameters: int
    compile_s: float
    verified: tuple[Compared, ...]
    resumed: bool


def deploy(
    model: MultiTaskModel,
    tasks: tuple[str, ...],
    target: Target,
    device: Device,
    bench: Bench,
    store: Store,
    inputs: int,
) -> Deployed:
    """Cut, export, plan, build and verify one task set's artifact in `artifacts/<name>`.

    A folder that already holds the artifact of the same plan is kept, and so is the proof that it was verified.

    Raises:
        CompressError, TargetError: whatever of these steps failed; an artifact that fails verification is removed.
    """
    pathway = extract(model, tasks)
    exported, program = to_program(pathway, model.inputs, bench.workload.normalisation)
    plan = target.plan(program, device)
    directory = store.directory / "artifacts" / program.name
    key = plan.digest()
    proof = store.facts("verified", key)
    sizes = (pathway.parameters(model), nonzero(pathway, model))
    if proof is not None and (built := _already(directory, key)) is not None:
        verified = tuple(Compared(**row) for row in proof["verified"])
        return Deployed(pathway, program, built, *sizes, proof["compile_s"], verified, resumed=True)
    begun = time.monotonic()
    built = target.build(plan, directory, _files(model, pathway), _about(pathway, sizes, bench))
    compile_s = time.monotonic() - begun
    if not _runs_here(target, built):
        return Deployed(pathway, program, built, *sizes, compile_s, (), resumed=False)
    try:
        verified = tuple(_verify(model, pathway, (exported, program), built, target, device, bench, inputs))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    with store.entry("verified", key, {"compile_s": compile_s, "verified": [asdict(row) for row in verified]}):
        pass
    return Deployed(pathway, program, built, *sizes, compile_s, verified, resumed=False)


def _already(directory: Path, plan: str) -> Artifact | None:
    """The artifact in a folder if it is whole and was built from this plan."""
    if not directory.is_dir():
        return None
    try:
        found = artifacts.read(directory)
    except TargetError:
        return None
    return found if found.manifest.plan == plan else None


def _runs_here(target: Target, built: Artifact) -> bool:
    try:
        target.load(built, threads=1)
    except TargetError:
        return False
    return True


def _verify(
    model: MultiTaskModel,
    pathway: Pathway,
    programs: tuple[Program, Program],
    built: Artifact,
    target: Target,
    device: Device,
    bench: Bench,
    count: int,
) -> list[Compared]:
    def partial(program: Program) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            part = target.build(target.plan(program, device), Path(folder) / "part", {}, {})
            return target.load(part, threads=1)

    return climb(model, pathway, programs, real_inputs(model, bench, count), reference, partial, target.load(built, 1))


def real_inputs(model: MultiTaskModel, bench: Bench, count: int) -> list[tuple[Tensor, ...]]:
    """Up to `count` inputs of the artifact's static shape, cut from the validate split; example inputs where it is empty."""
    found: list[tuple[Tensor, ...]] = []
    size = model.inputs[0].shape[0]
    for batch in bench.validation:
        rows = batch.inputs[0].shape[0]
        for first in range(0, rows - size + 1, size):
            taken = tuple(x[first : first + size].contiguous() for x in batch.inputs)
            if all(t.shape == e.shape for t, e in zip(taken, model.inputs, strict=True)):
                found.append(taken)
            if len(found) == count:
                return found
            if first >= size:  # spread over batches
                break
    return found or [model.inputs]


def nonzero(pathway: Pathway, model: MultiTaskModel) -> int:
    trained = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    return sum(int((tensor != 0).sum()) for name, tensor in pathway.tensors.items() if name in trained)


def _files(model: MultiTaskModel, pathway: Pathway) -> dict[str, bytes]:
    """Weights under their original names, and what was cut, relative to the network as it was brought."""
    record: dict[str, dict[str, list[int]]] = {}
    for name, tensor in pathway.tensors.items():
        for dim in range(tensor.dim()):
            before = model.kept.get(name, {}).get(dim)
            now = pathway.kept.get(name, {}).get(dim)
            if before is None and now is None:
                continue
            kept = list(before if before is not None else now or ())
            if before is not None and now is not None:
                kept = [before[k] for k in now]
            record.setdefault(name, {})[str(dim)] = kept
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
