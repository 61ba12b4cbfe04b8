"""CPU artifacts beside other engines: the same network and threads, engines taking turns in one run.

    python tools/bench/cpu.py [--json FILE] [--quick] [--network NAME ...]

A row's value is how many times faster the artifact is than the peer: the median over rounds of the ratio of the two
engines' medians within a round. Dense artifacts stand beside the faster of ONNX Runtime and OpenVINO (where that is
installed: pip install openvino), sparse and pruned ones beside dense ONNX Runtime and beside our own dense build;
eager PyTorch and, once, TVM's own kernels on one thread are there for the record.
"""

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import networks  # noqa: E402
import zoo  # noqa: E402
from rows import Row, finish, options  # noqa: E402
from workloads.age_gender import AgeGenderNetwork  # noqa: E402
from workloads.onet import ONetwork  # noqa: E402

from compressor.export import session  # noqa: E402
from compressor.groups import Prunable  # noqa: E402
from compressor.model import MultiTaskModel  # noqa: E402
from compressor.workload import Task  # noqa: E402
from examples.dronet.network import DroNetV2  # noqa: E402
from examples.scenes.network import SceneNet  # noqa: E402
from profiles.device import load as load_device  # noqa: E402
from targets.base import Array, Program  # noqa: E402
from targets.cpu import CpuTarget  # noqa: E402
from targets.lower import reference  # noqa: E402

Engine = Callable[[Array], object]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "resnet": (zoo.ResNet, (1, 3, 224, 224), ("label", "maps")),
    "mobilenet": (zoo.MobileNet, (1, 3, 224, 224), ("label", "maps")),
    "scenes": (SceneNet, (1, 3, 96, 96), ("segmentation", "depth", "normals")),
    "dronet": (DroNetV2, (1, 1, 200, 200), ("steering", "collision")),
    "transformer": (zoo.Transformer, (1, 3, 224, 224), ("label", "maps")),
    "recommender": (zoo.Recommender, (64, 256), ("click", "dwell")),
    "age-gender": (AgeGenderNetwork, (1, 3, 112, 112), ("age", "gender")),
    "onet": (ONetwork, (1, 3, 48, 48), ("face", "box", "landmarks")),
}
DENSITIES = (0.2, 0.1, 0.05)
OVERALL = {"dense": 1.0}
RECORD = "for the record"
GOALS = {
    ("dense", "resnet"): 1.15, ("20 % left", "resnet"): 2.2, ("10 % left", "resnet"): 4.0, ("5 % left", "resnet"): 6.0,
    ("10 % left", "mobilenet"): 2.5,
}  # fmt: skip
LEAST = {"dense": 0.85}
LEAST_OF_OWN = 0.98
SHARE_OF_MACS = 0.8


def program_of(module: nn.Module, shape: tuple[int, ...], tasks: tuple[str, ...], name: str) -> Program:
    """One fused output serves two tasks where there are fewer outputs than tasks; it is compiled as one."""
    with torch.no_grad():
        found = module(torch.zeros(shape))
    count = 1 if isinstance(found, torch.Tensor) else len(found)
    return networks.to_program(module, (torch.zeros(shape),), tasks[:count], name)


def halved(module: nn.Module, shape: tuple[int, ...], tasks: tuple[str, ...]) -> tuple[nn.Module, float]:
    """Every group of channels at half its width, and the share of multiply-adds that leaves."""
    with torch.no_grad():
        found = module(torch.zeros(shape))
    names = list(found) if isinstance(found, dict) else range(1 if isinstance(found, torch.Tensor) else len(found))
    listed = tuple(
        Task(task, output=output, metric="-", higher_is_better=True) for task, output in zip(tasks, names, strict=False)
    )
    model = MultiTaskModel(module, listed, (torch.zeros(shape),))
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    for group in prunable.groups:
        keep[group.classes[len(group.classes) // 2 :]] = False
    return prunable.cut(model, keep).module, prunable.cost(keep)[0] / prunable.cost(prunable.keep_all())[0]


def onnxruntime(program: Program, threads: int) -> Engine:
    loaded = session(program.model, threads)
    name = loaded.get_inputs()[0].name
    return lambda x: loaded.run(None, {name: x})


def openvino(program: Program, threads: int) -> Engine | None:
    """OpenVINO in float32, or None where it is not installed."""
    try:
        import openvino as ov
    except ImportError:
        return None
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(program.model.SerializeToString()), "CPU", settings)
    request = request.create_infer_request()
    return lambda x: request.infer([x])


def eager(module: nn.Module, threads: int) -> Engine:
    """PyTorch as it is written."""
    def run(x: Array) -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return module(torch.from_numpy(x))

    return run


def default_pipeline(program: Program, x: Array) -> float:
    """Seconds of TVM's own kernels for the same graph, seen once, for the record."""
    run = reference(program)
    run(x)
    begun = time.perf_counter()
    run(x)
    return time.perf_counter() - begun


def latencies(engines: dict[str, Engine], x: Array, rounds: int, calls: int) -> dict[str, list[float]]:
    """Median seconds a call of each engine in each round, in random order.

    A pause before each lets the threads of the one before fall asleep: engines keep them spinning for a while.
    """
    found: dict[str, list[float]] = {name: [] for name in engines}
    order, rng = list(engines), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            run = engines[name]
            time.sleep(0.1)
            run(x)
            run(x)
            samples = []
            for _ in range(calls):
                start = time.perf_counter()
                run(x)
                samples.append(time.perf_counter() - start)
            found[name].append(statistics.median(samples))
    return found


def times_faster(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def network_rows(name: str, folder: Path, rounds: int) -> list[Row]:
    """Every variant of one network against its peers, at 1 and 2 threads."""
    make, shape, tasks = NETWORKS[name]
    target, device, rows = CpuTarget(), load_device("host"), []

    def settled() -> nn.Module:
        torch.manual_seed(0)
        return networks.settle(make())

    modules = {"dense": settled()}
    modules |= {f"{density * 100:g} % left": zoo.sparsify(settled(), density) for density in DENSITIES}
    modules["channels halved"], share = halved(settled(), shape, tasks)
    programs = {variant: program_of(module, shape, tasks, name) for variant, module in modules.items()}
    artifacts = {}
    for variant, program in programs.items():
        start = time.perf_counter()
        artifacts[variant] = target.build(target.plan(program, device), folder / name / variant, {}, {})
        if variant == "dense":
            rows.append(Row("compile seconds", name, "", 2, time.perf_counter() - start, 60, most=True))
    x = networks.example(*shape)
    loads = []
    for _ in range(3):
        begun = time.perf_counter()
        runner = target.load(artifacts["dense"], 1)
        loads.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    runner(x)
    first = time.perf_counter() - begun
    steady = statistics.median(latencies({"dense": runner}, x, 3, calls=5)["dense"])
    rows.append(Row("load seconds", name, "", 1, statistics.median(loads), 0.2, most=True))
    rows.append(Row("first inference", name, "steady", 1, first / steady, 3.0, most=True))
    plain = default_pipeline(programs["dense"], x) / steady
    rows.append(Row(RECORD, name, "TVM's own", 1, plain, None, most=False))
    for threads in (1, 2):
        engines: dict[str, Engine] = {v: target.load(artifact, threads) for v, artifact in artifacts.items()}
        peers = {"ONNX Runtime": onnxruntime(programs["dense"], threads)}
        if (other := openvino(programs["dense"], threads)) is not None:
            peers["OpenVINO"] = other
        seen = latencies(engines | peers | {"PyTorch": eager(modules["dense"], threads)}, x, rounds, calls=5)
        slower = times_faster(seen["dense"], seen["PyTorch"])
        rows.append(Row(RECORD, name, "PyTorch", threads, slower, None, most=False))
        told = ", ".join(f"{engine} {statistics.median(times) * 1e3:.3f}" for engine, times in seen.items())
        print(f"{name}, {threads} threads, ms: {told}", file=sys.stderr, flush=True)
        best = min(peers, key=lambda peer: statistics.median(seen[peer]))
        for variant in artifacts:
            peer = best if variant == "dense" else "ONNX Runtime"
            goal = GOALS.get((variant, name), LEAST.get(variant))
            faster = times_faster(seen[variant], seen[peer])
            rows.append(Row(variant, name, peer, threads, faster, goal, most=False))
            if variant != "dense":
                least = SHARE_OF_MACS / share if variant == "channels halved" else LEAST_OF_OWN
                own = times_faster(seen[variant], seen["dense"])
                rows.append(Row(variant, name, "our own dense", threads, own, least, most=False))
    return rows


def overall(rows: list[Row]) -> list[Row]:
    """Geometric means over the networks."""
    found = []
    for variant, goal in OVERALL.items():
        for threads in (1, 2):
            values = [row.value for row in rows if row.case == variant and row.threads == threads]
            mean = math.exp(statistics.fmean(map(math.log, values)))
            found.append(Row(variant, f"mean of {len(values)}", "fastest peer", threads, mean, goal, most=False))
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="only these")
    chosen = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.network or NETWORKS:
            rows += network_rows(name, Path(folder), 3 if chosen.quick else 15)
    finish(rows + overall(rows), chosen.json)


if __name__ == "__main__":
    main()
