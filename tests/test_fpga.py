"""The fpga target: what is built answers through the simulator, says its cycles and where each layer is computed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from test_cli import compress, fails

from compressor.export import to_program
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from compressor.report import read
from compressor.speed import Speed
from compressor.stages.prune import Prune
from compressor.stages.quantize import Quantize
from compressor.verify import RUNGS
from profiles.device import load, names
from profiles.measure import Emulated, Estimate
from targets import artifact as artifacts
from targets.accelerator import package
from targets.accelerator.isa import Gemm, Load, Memory, Store, decode
from targets.accelerator.network import macs_of
from targets.accelerator.reading import read as read_layers
from targets.accelerator.tokens import check
from targets.base import Artifact, Program
from targets.errors import TargetError
from targets.fpga import FpgaTarget, design_of
from targets.lower import lower

pytestmark = pytest.mark.compile
ROOT = Path(__file__).parents[1]
CLOCK = load("ecp5-85k").clock
assert CLOCK is not None
MEGAHERTZ = CLOCK.megahertz
RECIPE = """
name = "tiny, in int8"
target = "fpga"
device = "ecp5-85k"
threads = [1]
task_sets = ["all"]
verify_inputs = 2

[workload]
factory = "tiny.py:Tiny"
checkpoint = "{checkpoint}"

[budgets]
kind = 0.2

[[stages]]
kind = "quantize"
batches = 2
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("fpga")
    recipe = tiny.recipe(folder)
    recipe.write_text(RECIPE.format(checkpoint=tiny.weights()))
    done = compress("run", recipe, "--out", folder / "out")
    assert done.exit_code == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def built(whole: Path) -> Artifact:
    return artifacts.read(whole / "artifacts" / "kind+size+mask")


def program_of(built: Artifact) -> Program:
    """What the artifact was built from."""
    model = onnx.load_model_from_string((built.directory / artifacts.MODEL).read_bytes())
    return Program(built.manifest.program, model, built.manifest.tasks)


def test_a_run_verifies_what_it_builds_and_calls_no_latency_measured(whole: Path) -> None:
    (row,), report = read(whole).artifacts, read(whole)
    assert [(v.rung, v.task) for v in row.verified] == [(rung, task) for rung in RUNGS for task in row.tasks]
    assert row.latency_ms is not None and row.latency_ms.kind == "emulated" and row.latency_ms.n == 0
    assert "place-and-route" in row.latency_ms.basis and "RTL simulation" in row.latency_ms.basis
    assert not report.baselines, "milliseconds of this machine stand beside no others"
    accelerated = [kernel for kernel in row.kernels if kernel.kernel.startswith("accelerator: ")]
    assert sum("array" in kernel.kernel for kernel in accelerated) == 5, "every convolution but the last"
    assert any(kernel.kernel.startswith("host: ") for kernel in row.kernels)


def test_the_cycles_of_layers_are_those_of_their_runs(built: Artifact) -> None:
    calls = json.loads((built.directory / artifacts.KERNELS).read_text())["calls"]
    cycles: dict[str, int] = {}
    for call in calls:
        if call["cycles"]:
            assert call["kernel"].startswith(f"accelerator: {call['cycles']:,} cycles")
            cycles[call["function"]] = cycles.get(call["function"], 0) + call["cycles"]
    runs = package.opened(built.directory)
    assert 0 <= sum(run.cycles() for run in runs) - sum(cycles.values()) < 8 * len(runs)  # the last tokens
    simulated = FpgaTarget().simulated(built)
    assert isinstance(simulated, Emulated)
    assert simulated.latency_ms == pytest.approx(sum(run.cycles() for run in runs) / MEGAHERTZ / 1e3)


def test_the_report_says_what_the_units_do_and_what_they_move(whole: Path, built: Artifact) -> None:
    (row,), runs = read(whole).artifacts, package.opened(built.directory)
    seen = row.accelerator
    assert seen is not None
    assert seen.cycles == tuple(run.cycles() for run in runs) and sum(seen.cycles) <= seen.shared_cycles
    assert seen.memory_bytes == (built.directory / package.IMAGE).stat().st_size
    programs = [list(decode(run.program)) for run in runs]
    moved = {Load: 0, Store: 0}
    busy = dict.fromkeys(("LOAD", "GEMM", "POST", "STORE"), 0)
    for one in (one for program in programs for one in program):
        entries = one.ny * one.nx
        if isinstance(one, Load | Store):
            wide = 4 if isinstance(one, Load) and one.memory is Memory.PARAMETERS else 1
            moved[type(one)] += 8 * entries * wide
        if isinstance(one, Gemm | Store):
            busy[type(one).__name__.upper()] += entries
    assert (seen.read_bytes, seen.written_bytes) == (moved[Load], moved[Store])
    assert seen.program_bytes == sum(16 * len(program) for program in programs)
    assert sum(kernel.moved_bytes for kernel in row.kernels) == moved[Load] + moved[Store]
    for unit in ("GEMM", "STORE"):
        worked = sum(seen.work[unit]) / len(seen.work[unit]) * sum(seen.cycles)
        assert worked == pytest.approx(busy[unit], rel=0.01)


def test_multiply_adds_are_the_layers_own(built: Artifact) -> None:
    calls = json.loads((built.directory / artifacts.KERNELS).read_text())["calls"]
    networks = read_layers(lower(program_of(built), integers=True)["main"]).networks
    wanted = [macs_of(node, network.values) for network in networks for node in network.nodes]
    assert [call["macs"] for call in calls if call["kernel"].startswith("accelerator: ")] == wanted


def test_its_programs_are_proved_for_its_design(built: Artifact) -> None:
    found = package.read(built.directory)
    words = (built.directory / package.IMAGE).stat().st_size // 8
    for run in found.runs:
        check(list(decode((built.directory / run.program).read_bytes())), found.design, words)


def test_bench_says_what_the_simulator_says(built: Artifact) -> None:
    said = compress("bench", built.directory)
    assert said.exit_code == 0 and f"cycles of the accelerator at {MEGAHERTZ:g} MHz" in said.stdout
    assert said.stdout.rstrip().endswith("not measured")


def test_a_profile_has_the_accelerators_layers_and_the_hosts_kernels(built: Artifact) -> None:
    rows = json.loads(compress("bench", built.directory, "--profile", "--json").stdout)
    calls = json.loads((built.directory / artifacts.KERNELS).read_text())["calls"]
    assert [row["kernel"] for row in rows] == [call["kernel"] for call in calls]
    for row, call in zip(rows, calls, strict=True):
        assert row["ms"] == pytest.approx(call["cycles"] / MEGAHERTZ / 1e3) if call["cycles"] else row["ms"] > 0
        assert row["how"] == ("RTL simulation, place-and-route" if call["cycles"] else "measured here")


def test_a_guessed_clock_makes_an_estimate(built: Artifact) -> None:
    plan = FpgaTarget().plan(program_of(built), load("zcu104"))
    with pytest.MonkeyPatch.context() as patch:
        manifest = built.manifest.model_copy(update={"device": plan.device})
        patch.setattr(artifacts, "read", lambda directory: Artifact(directory, manifest))
        assert isinstance(FpgaTarget().simulated(built), Estimate)


@pytest.mark.parametrize("name", names("fpga"))
def test_every_device_has_an_accelerator_for_the_network(name: str, built: Artifact) -> None:
    device = load(name)
    design, plan = design_of(device), FpgaTarget().plan(program_of(built), device)
    assert device.channel_multiple == design.rows
    assert any(name.startswith("accelerator") for name in plan.files)
    if (room := re.search(r"([\d,]+) 18x18 multipliers, (\d+) block RAMs", device.description)) is not None:
        assert (design.array_in == "multipliers") * design.multipliers + 4 * design.lanes <= int(room[1])
        assert sum(design.buffers.values()) <= int(room[2]) * 18 * 1024 // 8


def test_an_unquantized_network_is_refused(model: MultiTaskModel) -> None:
    program = to_program(extract(model, ["kind"]), model.inputs)[1]
    with pytest.raises(TargetError, match="it needs int8, so quantize it"):
        FpgaTarget().plan(program, load("ecp5-85k"))


def test_a_design_that_cannot_be_is_refused_by_its_profile(built: Artifact) -> None:
    device = load("ecp5-85k").model_copy(update={"array": {"rows": 24, "lane": 4}})
    with pytest.raises(TargetError, match=r"Device 'ecp5-85k', \[array\]: no option 'lane'. Did you mean 'lanes'"):
        FpgaTarget().plan(program_of(built), device)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (package.FILE, lambda raw: raw.replace(b'"runs"', b'"run"'), "no option 'run'. Did you mean 'runs'"),
        ("memory.image", lambda raw: raw[:64], "has no room for"),
        ("run0.program", lambda raw: raw[:-3], "is not one of whole instructions"),
        ("run0.program", lambda raw: b"\xff" + raw[1:], "unknown opcode"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused(name: str, change: object, message: str, built: Artifact, tmp_path: Path) -> None:
    for file in built.directory.iterdir():
        raw = file.read_bytes()
        (tmp_path / file.name).write_bytes(change(raw) if file.name == name else raw)  # type: ignore[operator]
    with pytest.raises(TargetError, match=message):
        package.opened(tmp_path)
    fails(compress("verify", tmp_path), f"{name} differs from its manifest")


def test_two_artifacts_are_run_by_turns(built: Artifact, whole: Path) -> None:
    target, chance = FpgaTarget(), np.random.default_rng(0)
    first, second = (target.load(built, threads=1) for _ in range(2))
    for _ in range(2):
        x = chance.random(built.manifest.inputs[0].shape, np.float32)
        for task, answer in first(x).items():
            assert np.array_equal(answer, second(x)[task])


def test_its_loader_answers_as_it_does_here(built: Artifact, tmp_path: Path) -> None:
    x = np.random.default_rng(1).random(built.manifest.inputs[0].shape, np.float32)
    np.save(tmp_path / "x.npy", x)
    code = f"""
import numpy, runpy
answers = runpy.run_path({str(built.directory / "run.py")!r})["load"](1)(numpy.load("x.npy"))
numpy.savez("answers.npz", **answers)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    with np.load(tmp_path / "answers.npz") as found:
        for task, answer in FpgaTarget().load(built, 1)(x).items():
            np.testing.assert_array_equal(found[task], answer)


def test_pruning_to_a_latency_goes_by_the_accelerators_cycles(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, kind=1.0, size=1e3, mask=1.0)
    device = load("ecp5-45k")
    bench.multiple, bench.speed = device.channel_multiple, Speed(model, FpgaTarget(), device, 1, 0)
    found = Prune(kind="prune", latency=0.5, slack=1e3).run(model, bench)
    reached = bench.speed(found)
    assert 0.4 <= reached <= 0.525
    with_grids = Quantize(kind="quantize", batches=2).run(found, bench)
    assert bench.speed(with_grids) == pytest.approx(reached, rel=0.02), "not what the grids of real values make of it"


def test_a_recipe_that_does_not_quantize_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    said = compress("run", recipe, "--set", "target=fpga", "--set", "device=ecp5-85k", "--out", tmp_path / "run")
    fails(said, "The fpga target computes in int8; put a 'quantize' stage into the recipe.")
    assert not (tmp_path / "run").exists()
