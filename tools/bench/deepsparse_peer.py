"""Sparse networks beside DeepSparse, whose engine ended in 2025 and needs an environment of its own.

    python3 -m venv DIR && DIR/bin/pip install deepsparse==1.8.0
    python tools/bench/deepsparse_peer.py --python DIR/bin/python [--json FILE] [--quick]

The same ONNX files, rewritten for what DeepSparse reads (IR version 8, opset 14); engines take turns, each in a process
of its own as they cannot share one; medians of the turns.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cpu  # makes the tests' networks importable
import networks
import numpy as np
import onnx
import torch
import zoo
from rows import Row, finish, options

ROOT = Path(__file__).resolve().parents[2]

TIMED = """
import statistics, sys, time
for _ in range(20): call()
seen = []
for _ in range(100):
    begun = time.perf_counter(); call(); seen.append(time.perf_counter() - begun)
print(statistics.median(seen))
"""
OURS = """
import numpy as np
from pathlib import Path
from targets import artifact
from targets.cpu import CpuTarget
runner = CpuTarget().load(artifact.read(Path({file!r})), {threads})
x = np.load({x!r}); call = lambda: runner(x)
"""
THEIRS = """
import numpy as np, deepsparse
engine = deepsparse.Engine(model={file!r} + ".onnx", batch_size=1, num_cores={threads})
x = [np.load({x!r})]; call = lambda: engine.run(x)
"""
AHEAD = 2.0


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in an older form."""
    older = onnx.version_converter.convert_version(model, 14)
    older.ir_version = 8
    for node in older.graph.node:
        for attribute in [a for a in node.attribute if a.name in ("noop_with_empty_axes", "allowzero")]:
            node.attribute.remove(attribute)
    return older


def seconds(python: str, code: str, **given: object) -> float:
    text = code.format(**given) + TIMED
    done = subprocess.run([python, "-c", text], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{python} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--python", required=True, help="of an environment that has DeepSparse 1.8")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        x = f"{folder}/x.npy"
        for name in ("resnet", "mobilenet"):
            for left in (0.1,) if given.quick else (0.2, 0.1, 0.05):
                make, shape, tasks = cpu.NETWORKS[name]
                torch.manual_seed(0)
                module = zoo.sparsify(networks.settle(make()), left)
                program = cpu.program_of(module, shape, tasks, name)
                np.save(x, np.random.default_rng(0).standard_normal(shape, np.float32))
                file = f"{folder}/{name}-{left}"
                onnx.save(rewritten(program.model), f"{file}.onnx")
                target = cpu.CpuTarget()
                target.build(target.plan(program, cpu.load_device("host")), Path(file), {}, {})
                for threads in (1, 2):
                    how = {"file": file, "threads": threads, "x": x}
                    ratios = [
                        seconds(given.python, THEIRS, **how) / seconds(sys.executable, OURS, **how)
                        for _ in range(2 if given.quick else 3)
                    ]
                    case = f"{100 * left:g} % left"
                    ahead = statistics.median(ratios)
                    rows.append(Row(case, name, "DeepSparse", threads, ahead, AHEAD, most=False))
    finish(rows, given.json)


if __name__ == "__main__":
    main()
