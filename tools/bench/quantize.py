"""int8 without training: what each task loses, on exact grids (plain, equalised) and any, and whether ONNX Runtime
answers on exact ones as the simulation does.

    python tools/bench/quantize.py [--json FILE] [--quick]

Drops are those of the `quantize` stage's defaults on the validate split: relative to the original's score, but DroNet's
collision in points of accuracy. --quick compares eight answers with ONNX Runtime's instead of sixty-four.
"""

from pathlib import Path

import numpy as np
import torch
from rows import Row, finish, options

from compressor import compute, pipeline, recipe
from compressor.budgets import drop
from compressor.deploy import real_inputs
from compressor.export import run, session, to_program
from compressor.pathway import extract
from compressor.progress import Reporter
from compressor.stages.quantize import Quantize

RECIPES = Path(__file__).parent / "recipes"
SCENES = ("segmentation", "depth", "normals")
GOALS = {"dronet": {"steering": 0.02, "collision": 0.005}, "scenes": dict.fromkeys(SCENES, 0.02)}
ABSOLUTE = {"collision"}
HOW = {
    "int8, any steps": {"steps": "any"}, "int8, equalised": {"steps": "exact", "equalise": "always"},
    "int8": {"steps": "exact"},
}


def rows_of(network: str, count: int) -> list[Row]:
    loaded, base = recipe.load(RECIPES / f"{network}-channels.toml")
    job = pipeline.prepare(loaded, base, Reporter(), builds=False)
    bench = job.bench
    with compute.threads(loaded.compute_threads):
        bench.before = bench.scores(job.model)
        rows = []
        for said, how in HOW.items():
            stage = Quantize.model_validate({"kind": "quantize", "most_kept": 0.0, "equalise": "never"} | how)
            found = stage.run(job.model, bench)
            scores = bench.scores(found)
            for task in found.tasks:
                lost = drop(task, bench.before[task.name], scores[task.name])
                share = lost if task.name in ABSOLUTE else lost / abs(bench.before[task.name])
                goal = GOALS[network][task.name]
                rows.append(Row(f"drop of {task.name}, {said}", network, "", 0, share, goal, most=True))
    tasks = [task.name for task in found.tasks]
    by_onnx = session(to_program(extract(found, tasks), found.inputs)[1].model, optimised=False)
    worst = 0.0
    for inputs in real_inputs(found, bench, count):
        given = run(by_onnx, tuple(x.numpy() for x in inputs))
        with torch.no_grad():
            wanted = {name: answer.numpy() for name, answer in found.answers(*inputs).items()}
        gaps = [np.abs(given[name] - wanted[name]).max() / np.abs(wanted[name]).max() for name in tasks]
        worst = max(worst, float(max(gaps)))
    rows.append(Row("largest difference, of the largest answer", network, "ONNX Runtime", 0, worst, 0.0, most=True))
    return rows


def main() -> None:
    given = options(__doc__).parse_args()
    finish([row for network in GOALS for row in rows_of(network, 8 if given.quick else 64)], given.json)


if __name__ == "__main__":
    main()
