"""CPU artifacts beside ONNX Runtime: same ONNX graph, same threads, engines interleaved in one run.

    python tools/bench/cpu.py [--json FILE] [--quick]

A row's value is the artifact's latency as a fraction of the peer's: the median over rounds of the ratio of the two
engines' medians within a round. Below the goal holds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import networks  # noqa: E402

from profiles.device import load as load_device  # noqa: E402
from targets.base import Array, Program  # noqa: E402
from targets.cpu import CpuTarget  # noqa: E402

GOAL = 2.0


def programs() -> dict[str, tuple[Program, Array]]:
    """Every network measured, with an input; random weights do, for dense kernels do not look at them."""
    torch.manual_seed(0)
    made = {}
    for name, module, shape, tasks in (
        ("dronet", networks.DroNet(), (1, 1, 200, 200), ("steering", "collision")),
        ("scenes-like", networks.ScenesLike(), (1, 3, 96, 96), ("segmentation", "depth", "normals")),
        ("mobile", networks.Mobile(), (1, 3, 112, 112), ("age", "gender")),
    ):
        program = networks.to_program(networks.settle(module), (torch.zeros(shape),), tasks, name)
        made[name] = (program, networks.example(*shape))
    return made


def peer(program: Program, threads: int) -> Callable[[Array], object]:
    """ONNX Runtime with its own defaults but for the threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model.SerializeToString(), options, ["CPUExecutionProvider"])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    options = parser.parse_args()
    rounds = 5 if options.quick else 50
    target, device, rows = CpuTarget(), load_device("host"), []
    with tempfile.TemporaryDirectory() as folder:
        for name, (program, x) in programs().items():
            start = time.perf_counter()
            artifact = target.build(target.plan(program, device), Path(folder) / name, {}, {})
            print(f"{name}: compiled in {time.perf_counter() - start:.1f} s")
            for threads in (1, 2):
                ours, theirs = target.load(artifact, threads), peer(program, threads)
                pairs = [(latency(ours, x, 10), latency(theirs, x, 10)) for _ in range(rounds)]
                value = statistics.median(a / b for a, b in pairs)
                ours_ms, theirs_ms = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
                rows.append({
                    "case": "latency_ratio", "network": name, "peer": "onnxruntime", "threads": threads,
                    "value": value, "goal": GOAL, "holds": bool(value <= GOAL), "ms": ours_ms, "peer_ms": theirs_ms,
                })
                print(f"{name}, {threads} threads: {ours_ms:.3f} ms, ONNX Runtime {theirs_ms:.3f} ms, x{value:.2f}")
                assert all(np.isfinite(answer).all() for answer in ours(x).values())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
