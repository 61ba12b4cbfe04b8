"""DroNet, scenes and a ViT in int8 on the accelerator's 16 x 8 array: bits, cycles, what sparsity saves. No board.

    python tools/bench/fpga.py [--json FILE] [--quick] [--route DEVICE ...]

Bits and cycles are compared on three levels: layers in numpy, programs in the instruction-level simulator, and the
circuit under Verilator, which takes a minute to build the first time. Cycles are of a memory that answers after 20, and
all are counted. Cut and sparse networks, and the ViT, are not trained here: cycles do not depend on that. Scenes is an
artifact of the fpga target, with its host's part. --quick runs 8 frames, and two of the ViT's layers.

With --route instead: what the devices' profiles say of their clocks, synthesised, placed and routed again from the
seed that they name. Another version of the router, or another circuit, may differ a little. Ten minutes a device.
"""

import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import zoo
from rows import Row, finish, options

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from plain import setup, task

from compressor import compute, pipeline, recipe
from compressor.bench import Bench
from compressor.deploy import real_inputs
from compressor.export import run, session, to_program
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from compressor.pipeline import Job
from compressor.progress import Reporter
from compressor.stages.prune import Prune
from compressor.stages.quantize import Quantize
from compressor.stages.ticket import Ticket
from compressor.trace import trace
from compressor.training import Training
from profiles.device import load
from targets.accelerator import package, simulator, synthesis
from targets.accelerator.circuit import verilated
from targets.accelerator.design import Design
from targets.accelerator.layers import Product
from targets.accelerator.network import Executable, Network, compile_network, compile_networks
from targets.accelerator.partition import partition
from targets.accelerator.reading import read
from targets.base import Program
from targets.fpga import FpgaTarget, clock_of, design_of
from targets.lower import lower
from targets.profiling import kernels

Frame = dict[str, np.ndarray]
"""A run's inputs as the host gives them, int8 (channels, height, width)."""

RECIPES = Path(__file__).parent / "recipes"
DEVICE = "ecp5-85k"
DESIGN, RTL_FRAMES, LATENCIES = Design(), 3, (0.6, 0.3)
CUT = Prune(kind="prune", macs=0.3, parameters=0.25, rounds=1, batches=2, criterion="magnitude", slack=1e9)
SPARSE = Ticket(
    kind="ticket", keep_ratio=0.2, rounds=1, pattern="8x16", scope="layer", train=Training(steps=0), slack=1e9
)


def in_int8(model: MultiTaskModel, bench: Bench) -> Program:
    """The model, quantized, all tasks together."""
    found = Quantize(kind="quantize", most_kept=0.0, slack=1e9).run(model, bench)
    return to_program(extract(found, [task.name for task in found.tasks]), found.inputs)[1]


def integers(model: MultiTaskModel, bench: Bench) -> Network:
    """The model in int8 as integer layers, of which one run computes all."""
    (network,) = read(lower(in_int8(model, bench), integers=True)["main"]).networks
    return network


def frames(bench: Bench, network: Network, count: int | None) -> list[Frame]:
    """Validation frames as the host gives them to the accelerator, (channels, height, width)."""
    (name,), found = network.inputs, list[Frame]()
    grid = network.values[name].grid
    for batch in bench.validation:
        steps = np.rint(batch.inputs[0].numpy() / np.float32(grid.scale)) + grid.zero
        found += [{name: one} for one in np.clip(steps, -128, 127).astype(np.int8)]
        if count is not None and len(found) >= count:
            return found[:count]
    return found


def given(built: Executable, frame: Frame) -> np.ndarray:
    """Memory before a frame."""
    memory = built.image.copy()
    for name, value in frame.items():
        built.write(name, value, memory)
    return memory


def bits(network: Network, built: Executable, inputs: list[Frame]) -> int:
    """Frames of which any value differs between program and layers."""
    wrong = 0
    for frame in inputs:
        memory, wanted = given(built, frame), network(frame)
        simulator.execute(built.program, memory, DESIGN)
        made = [node.result for node in network.nodes]
        wrong += not all(np.array_equal(built.read(value, memory), wanted[value]) for value in made)
    return wrong


def sharing(built: Executable, frame: Frame) -> tuple[int, float]:
    """Where the memory's ports share a bus: (the cycles that are told, the circuit's over them)."""
    told = simulator.timing(built.program, DESIGN, shared=True).cycles
    found, _ = verilated.run(verilated.library(DESIGN), built.program, given(built, frame), shared=True)
    return told, found / told


def circuit(built: Executable, inputs: list[Frame]) -> tuple[int, int, float, float]:
    """(frames that differ in a bit, cycles that they are off by, seconds of a frame, times the model is faster)."""
    library, wrong, off, seconds = verilated.library(DESIGN), 0, 0, []
    for frame in inputs:
        memory = given(built, frame)
        expected = memory.copy()
        cycles = simulator.execute(built.program, expected, DESIGN).cycles
        begun = time.perf_counter()
        found, _ = verilated.run(library, built.program, memory)
        seconds.append(time.perf_counter() - begun)
        wrong, off = wrong + (not np.array_equal(memory, expected)), off + abs(found - cycles)
    begun = time.perf_counter()
    for _ in range(20):
        simulator.timing(built.program, DESIGN)
    model = (time.perf_counter() - begun) / 20
    return wrong, off, max(seconds), float(np.median(seconds)) / model


def dronet(job: Job, count: int | None) -> list[Row]:
    bench, rows = job.bench, list[Row]()

    def row(case: str, value: float, goal: float | None, *, most: bool = True) -> None:
        rows.append(Row(case, "dronet", "", 0, value, goal, most=most))

    network = integers(job.model, bench)
    built = compile_network(network, DESIGN)
    inputs = frames(bench, network, count)
    dense = simulator.timing(built.program, DESIGN).cycles
    row("cycles of a frame", dense, None)
    row("utilisation of the array", network.macs / DESIGN.multipliers / dense, 0.75, most=False)
    row("frames simulated", len(inputs), None)
    row("of them with a wrong bit", bits(network, built, inputs), 0)
    wrong, off, seconds, faster = circuit(built, inputs[:RTL_FRAMES])
    row(f"of {RTL_FRAMES} in RTL, with a wrong bit", wrong, 0)
    row("cycles that the model is off by", off, 0)
    told, share = sharing(built, inputs[0])
    row("cycles of a frame, memory's ports sharing a bus", told, None)
    row("those of RTL over them", share, None)
    row("seconds of a frame in RTL", seconds, 300)
    row("times the cycle model is faster than RTL", faster, 1000, most=False)
    cut = CUT.run(job.model, bench)
    for case, model, goal in (
        ("cut to 30 % of the multiply-adds", cut, 2.5),
        ("80 % of the weights in empty tiles", SPARSE.run(job.model, bench), 3.0),
        ("both", SPARSE.run(cut, bench), None),
    ):
        cycles = simulator.timing(compile_network(integers(model, bench), DESIGN).program, DESIGN).cycles
        row(f"times fewer cycles: {case}", dense / cycles, goal, most=False)
    assert bench.speed is not None
    for asked in LATENCIES:
        pruned = Prune(kind="prune", latency=asked, rounds=1, batches=2, criterion="magnitude", slack=1e9)
        row(f"cycles over {asked:.0%}, asked of prune", bench.speed(pruned.run(job.model, bench)) / asked, 1.05)
    return rows


def scenes(job: Job, count: int | None) -> list[Row]:
    """All tasks as one artifact: its runs, how full the array is, and how far its answers are from ONNX Runtime's."""
    program, target = in_int8(job.model, job.bench), FpgaTarget()
    plan = target.plan(program, load(DEVICE))
    with TemporaryDirectory() as folder:
        built = target.build(plan, Path(folder) / "artifact", {}, {})
        runner, runs = target.load(built, threads=1), package.opened(built.directory)
        calls = kernels(built).calls
        peer, gap, alike = session(program.model, optimised=False), 0.0, list[bool]()
        for inputs in real_inputs(job.model, job.bench, 8 if count else 64):
            arrays = tuple(x.numpy() for x in inputs)
            answers = runner(*arrays)
            for task, wanted in run(peer, arrays).items():
                off = float(np.abs(answers[task] - wanted).max() / np.abs(wanted).max())
                gap, alike = max(gap, off), [*alike, off < 1e-6]
    cycles = sum(one.cycles() for one in runs)
    macs = sum(call.macs for call in calls if call.accelerated)
    whole = count_macs(trace(job.model))[0]
    return [
        Row("cycles of a frame", "scenes", "", 0, cycles, None, most=True),
        Row("runs of the accelerator", "scenes", "", 0, len(runs), None, most=True),
        Row("utilisation of the array", "scenes", "", 0, macs / DESIGN.multipliers / cycles, 0.75, most=False),
        Row("multiply-adds left to the host", "scenes", "", 0, 1 - macs / whole, None, most=True),
        Row("largest difference, of the largest answer", "scenes", "ONNX Runtime", 0, gap, 0.0, most=True),
        Row("answers without a difference", "scenes", "ONNX Runtime", 0, float(np.mean(alike)), 1.0, most=False),
    ]


def transformer(quick: bool) -> list[Row]:
    """A two-task ViT: layers of tokens and attention's products on the array; norms, softmax and GELU on the host."""
    tasks = [task("label"), task("maps")]
    tasks = [replace(one, output=k) for k, one in enumerate(tasks)]
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model, bench = setup(
            partial(zoo.Transformer, layers=2 if quick else 6), (torch.zeros(1, 3, 224, 224),), Path(folder), *tasks
        )
        program = in_int8(model, bench)
    networks = partition(lower(program, integers=True), "transformer.").networks
    chance, rows = np.random.default_rng(0), list[Row]()
    built = compile_networks(networks, DESIGN)
    inputs = [
        {name: chance.integers(-128, 128, network.values[name].shape, np.int8) for name in network.inputs}
        for network in networks
    ]
    cycles = sum(simulator.timing(one.program, DESIGN).cycles for one in built)
    macs, whole = sum(network.macs for network in networks), count_macs(trace(model))[0]
    wrong = sum(bits(*one, [frame]) for one, frame in zip(zip(networks, built, strict=True), inputs, strict=True))
    product = next(k for k, one in enumerate(networks) if any(isinstance(node.layer, Product) for node in one.nodes))
    in_rtl = circuit(built[product], [inputs[product]])

    def row(case: str, value: float, goal: float | None, *, most: bool = True) -> None:
        rows.append(Row(case, "vit", "", 0, value, goal, most=most))

    row("cycles of a frame", cycles, None)
    row("runs of the accelerator", len(networks), None)
    row("utilisation of the array", macs / DESIGN.multipliers / cycles, 0.7, most=False)
    row("multiply-adds left to the host", 1 - macs / whole, None)
    row("runs with a wrong bit", wrong, 0)
    row("of one product in RTL, with a wrong bit", in_rtl[0], 0)
    row("cycles that the model is off by", in_rtl[1], 0)
    return rows


def routed(name: str) -> list[Row]:
    """A device's clock over its profile's, and how much of the device its circuit takes."""
    device = load(name)
    clock, seed = clock_of(device), re.search(r"seed (\d+)$", clock_of(device).how)
    if clock.by != "place-and-route" or seed is None:
        raise SystemExit(f"The clock of '{name}' was not routed from a seed: {clock.by}, {clock.how}.")
    with TemporaryDirectory() as folder:
        found = synthesis.fit(design_of(device), name, [int(seed[1])], Path(folder))
    reached = found.best.megahertz if found.best is not None else 0.0
    rows = [Row("clock, over its profile's", name, "", 0, reached / clock.megahertz, 0.95, most=False)]
    for cell in ("TRELLIS_COMB", "TRELLIS_FF", "MULT18X18D", "DP16KD") if found.best is not None else ():
        share = found.best.used.get(cell, 0) / found.best.there[cell]  # type: ignore[union-attr]
        rows.append(Row(f"share of its {cell}", name, "", 0, share, None, most=True))
    return rows


def main() -> None:
    parser, rows = options(__doc__), list[Row]()
    parser.add_argument("--route", nargs="+", metavar="DEVICE", help="route these again")
    how = parser.parse_args()
    if how.route:
        finish([row for name in how.route for row in routed(name)], how.json)
        return
    for name, rows_of in (("dronet-channels", dronet), ("scenes-channels", scenes)):
        loaded, base = recipe.load(RECIPES / f"{name}.toml", ["target=fpga", f"device={DEVICE}"])
        job = pipeline.prepare(loaded, base, Reporter(), builds=False)
        with compute.threads(loaded.compute_threads), TemporaryDirectory() as scratch:
            job.bench.before, job.bench.directory = job.bench.scores(job.model), Path(scratch)
            rows += rows_of(job, 8 if how.quick else None)
    rows += transformer(how.quick)
    finish(rows, how.json)


if __name__ == "__main__":
    main()
