"""CPU artifacts beside ONNX Runtime: same ONNX graph, same threads, engines interleaved in one run.

    python tools/bench/cpu.py [--json FILE] [--quick]

A row's value is the artifact's latency as a fraction of the peer's: the median over rounds of the ratio of the two
engines' medians within a round.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import networks  # noqa: E402
from rows import Row, finish, options  # noqa: E402
from workloads.age_gender import AgeGenderNetwork  # noqa: E402
from workloads.onet import ONetwork  # noqa: E402

from examples.dronet.network import DroNetV2  # noqa: E402
from examples.scenes.network import SceneNet  # noqa: E402
from profiles.device import load as load_device  # noqa: E402
from targets.base import Array, Program  # noqa: E402
from targets.cpu import CpuTarget  # noqa: E402

GOAL = 2.0
CASES = {
    "dronet": (DroNetV2, (1, 1, 200, 200), ("both",)),
    "scenes": (SceneNet, (1, 3, 96, 96), ("segmentation", "depth", "normals")),
    "age-gender": (AgeGenderNetwork, (1, 3, 112, 112), ("age", "gender")),
    "onet": (ONetwork, (1, 3, 48, 48), ("face", "box", "landmarks")),
}


def peer(program: Program, threads: int) -> Callable[[Array], object]:
    """ONNX Runtime with its own defaults but for the threads."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model.SerializeToString(), settings, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def latency(run: Callable[[Array], object], x: Array, calls: int) -> float:
    """Median seconds a call, after a pause in which the other engine's threads fall asleep and two calls to warm up."""
    time.sleep(0.01)
    run(x)
    run(x)
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        run(x)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def main() -> None:
    chosen = options(__doc__)
    rounds = 5 if chosen.quick else 50
    target, device, rows = CpuTarget(), load_device("host"), []
    torch.manual_seed(0)  # random weights do: dense kernels do not look at them
    with tempfile.TemporaryDirectory() as folder:
        for name, (network, shape, tasks) in CASES.items():
            program = networks.to_program(networks.settle(network()), (torch.zeros(shape),), tasks, name)
            x = networks.example(*shape)
            start = time.perf_counter()
            artifact = target.build(target.plan(program, device), Path(folder) / name, {}, {})
            rows.append(Row("compile_seconds", name, "-", 0, time.perf_counter() - start, 20.0, True))
            for threads in (1, 2):
                ours, theirs = target.load(artifact, threads), peer(program, threads)
                pairs = [(latency(ours, x, 10), latency(theirs, x, 10)) for _ in range(rounds)]
                mine, other = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
                print(f"{name}, {threads} threads: ours {mine:.3f} ms, ONNX Runtime {other:.3f} ms", file=sys.stderr)
                value = statistics.median(a / b for a, b in pairs)
                rows.append(Row("latency_ratio", name, "onnxruntime", threads, value, GOAL, True))
    finish(rows, chosen.json)


if __name__ == "__main__":
    main()
