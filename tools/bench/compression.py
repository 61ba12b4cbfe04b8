"""Pruning beside its controls: what every task lost at the same multiply-adds and parameters.

    python tools/bench/compression.py [--json FILE] [--quick] [--results FOLDER] [--seed N ...]

With --latency instead: goals in latency on scenes, without training, and what the pruned network then takes.

Each case starts from the same trained network and gets the same training: the same recovery and the same fine-tuning.
Scores are taken on the validate split, drops are relative to the original's score. Finished cases are kept in the
results folder and not repeated; --quick runs seed 0 with a tenth of the training.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import controls
from rows import Row, finish, options

from compressor import pipeline, recipe
from compressor.bench import Bench
from compressor.budgets import drop
from compressor.model import MultiTaskModel
from compressor.progress import Reporter
from compressor.record import sizes_of
from compressor.stages.finetune import Finetune
from compressor.stages.prune import Prune
from compressor.training import Training, train

ROOT = Path(__file__).resolve().parents[2]
KEEP, LARGEST_DROP = 0.35, 0.02
OURS = "ours"

Case = Callable[[MultiTaskModel, Bench, Prune, Finetune], MultiTaskModel]


def pruned(**settings: object) -> Case:
    """The recipe's own stages with some settings of `prune` changed; a round may lose what it likes."""

    def run(model: MultiTaskModel, bench: Bench, prune: Prune, tune: Finetune) -> MultiTaskModel:
        return tune.run(prune.model_copy(update={"slack": 1000.0} | settings).run(model, bench), bench)

    return run


def published(model: MultiTaskModel, bench: Bench, prune: Prune, tune: Finetune) -> MultiTaskModel:
    assert prune.recover is not None
    case = controls.Published(KEEP, prune.recover)
    found = tune.run(case.run(model, bench), bench)
    bench.note(f"{case.passes} passes over the loader")
    return found


def scratch(model: MultiTaskModel, bench: Bench, prune: Prune, tune: Finetune) -> MultiTaskModel:
    """The shape that ours ends with, trained for all the steps that ours is given."""
    shape = prune.model_copy(update={"recover": None}).run(model, bench)
    how = Training(**tune.model_dump(exclude={"kind"}))
    return controls.from_scratch(shape, bench, how.model_copy(update={"steps": tune.steps + prune.train_steps}))


def longer(model: MultiTaskModel, bench: Bench, prune: Prune, tune: Finetune) -> MultiTaskModel:
    """The whole network, trained on for as many steps: what of a gain is only more training."""
    found = model.clone()
    train(found, bench, tune.model_copy(update={"steps": tune.steps + prune.train_steps}), "longer", bench.seed)
    return found


CASES: dict[str, Case] = {
    OURS: pruned(),
    "uniform width": pruned(search="uniform", criterion="magnitude"),
    "magnitude": pruned(criterion="magnitude"),
    "PAGCP, as published": published,
    "sequential": pruned(search="sequential", slack=20.0),
    "from scratch": scratch,
    "original, trained on": longer,
}


def run(name: str, seed: int, share: float, folder: Path) -> dict[str, Any]:
    """One case's sizes and scores; from the folder where it was run before."""
    file = folder / f"scenes-{name.replace(' ', '-').replace(',', '')}-{seed}-{share:g}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    keep = [f"stages.0.macs={KEEP}", f"stages.0.parameters={KEEP}", f"seed={seed}"]
    loaded, base = recipe.load(ROOT / "examples" / "scenes", keep)
    job = pipeline.prepare(loaded, base, Reporter(), builds=False)
    prune, tune = loaded.stages
    assert isinstance(prune, Prune) and isinstance(tune, Finetune) and prune.recover is not None
    tune = tune.model_copy(update={"steps": round(share * tune.steps)})
    bench = job.bench
    bench.before, bench.directory = bench.scores(job.model), folder
    begun = time.monotonic()
    model = CASES[name](job.model, bench, prune, tune)
    scores = bench.scores(model)
    lost = {t.name: drop(t, bench.before[t.name], scores[t.name]) / abs(bench.before[t.name]) for t in model.tasks}
    before, after = sizes_of(job.model), sizes_of(model)
    found = {
        "case": name, "seed": seed, "seconds": time.monotonic() - begun, "notes": bench.notes, "scores": scores,
        "lost": lost, "macs": after[0] / before[0], "parameters": after[1] / before[1], "steps": tune.steps,
    }
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=1))
    draft.replace(file)
    return found


def latency() -> list[Row]:
    """Latency reached over latency asked for, timed once more when the stage is over."""
    rows = []
    for goal in (0.6, 0.4):
        loaded, base = recipe.load(ROOT / "examples" / "scenes", [f"stages.0.latency={goal}"])
        job = pipeline.prepare(loaded, base, Reporter(), builds=False)
        job.bench.before = job.bench.scores(job.model)
        prune = loaded.stages[0]
        assert isinstance(prune, Prune) and job.bench.speed is not None
        alone = {"macs": None, "parameters": None, "recover": None, "slack": 1e9, "rounds": 1}
        reached = job.bench.speed(prune.model_copy(update=alone).run(job.model, job.bench))
        name = f"latency reached over {goal:g} asked for"
        rows.append(Row(name, "scenes", "", loaded.threads[0], reached / goal, 1.05, most=True))
    return rows


def table(found: dict[str, list[dict[str, Any]]], share: float) -> str:
    """Markdown: a row a case, means over the seeds, and how far they spread where there are several."""
    first = next(iter(found.values()))
    tasks, seeds = list(first[0]["lost"]), [one["seed"] for one in first]

    def cell(values: list[float]) -> str:
        spread = f" ({100 * min(values):+.1f} to {100 * max(values):+.1f})" if len(values) > 1 else ""
        return f"{100 * sum(values) / len(values):+.1f} %{spread}"

    lines = [
        "# Scenes: channel pruning beside its controls",
        "",
        f"`tools/bench/compression.py`; seeds {', '.join(map(str, seeds))}; {round(100 * share)} % of the recipe's "
        f"training ({first[0]['steps']} steps of fine-tuning after pruning), on the CPU. Drops are relative to the "
        "original's score on the validate split, positive is worse. Every case gets the same recovery and fine-tuning.",
        "",
        f"| case | MACs left | parameters left | {' | '.join(tasks)} | worst |",
        f"|{'---|' * (4 + len(tasks))}",
    ]
    for name, runs in found.items():
        sizes = [f"{100 * sum(one[key] for one in runs) / len(runs):.1f} %" for key in ("macs", "parameters")]
        drops = [cell([one["lost"][task] for one in runs]) for task in tasks]
        worst = cell([max(one["lost"].values()) for one in runs])
        lines.append(f"| {' | '.join([name, *sizes, *drops, worst])} |")
    notes = [f"- {name}: {note}" for name, runs in found.items() for one in runs for note in one["notes"]]
    return "\n".join([*lines, "", *dict.fromkeys(notes)]).rstrip() + "\n"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "compression")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--table", type=Path, help="write a table for people (Markdown) here")
    parser.add_argument("--latency", action="store_true", help="only goals in latency")
    given = parser.parse_args()
    if given.latency:
        finish(latency(), given.json)
        return
    given.results.mkdir(parents=True, exist_ok=True)
    share, seeds = (0.1, [0]) if given.quick else (1.0, given.seed)
    found = {name: [run(name, seed, share, given.results) for seed in seeds] for name in given.case}

    def mean(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return sum(map(value, found[name])) / len(found[name])

    def worst(name: str) -> float:
        return max(mean(name, lambda one, t=task: one["lost"][t]) for task in found[name][0]["lost"])

    rows = []
    for name in found:
        ours = name == OURS
        for size in ("macs", "parameters"):
            value = mean(name, lambda one, key=size: one[key])
            rows.append(Row(f"{size} left", "scenes", name, 0, value, KEEP if ours else None, most=True))
        for task in found[name][0]["lost"]:
            value, goal = mean(name, lambda one, t=task: one["lost"][t]), LARGEST_DROP if ours else None
            rows.append(Row(f"relative drop of {task}", "scenes", name, 0, value, goal, most=True))
        if not ours and OURS in found and name != "original, trained on":
            ahead = worst(name) - worst(OURS)
            rows.append(Row("worst drop, less ours", "scenes", name, 0, ahead, 0.0, most=False))
    finish(rows, given.json)
    if given.table:
        given.table.write_text(table(found, share))
    print(f"{len(seeds)} seed(s), {round(share * 100)} % of the training", file=sys.stderr)


if __name__ == "__main__":
    main()
