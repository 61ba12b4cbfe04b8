"""Pruning and tickets beside their controls: what every task lost, and how much of the network is left.

    python tools/bench/compression.py [STUDY ...] [--case CASE ...] [--seed N ...] [--json FILE] [--quick] [--tables]

A study is a recipe of `recipes/` with what its result must reach (`cases.py`). Each case of it starts from the same
trained network, but "from scratch" and "single tasks", and gets the same training; PAGCP as published recovers as often
as it needs rounds, and "magnitude, tuned" is the best of nine after recovery. Scores are taken on the validate split; a
drop is compared with the largest one accepted, relative to the original's score ("2 %") or in the metric's unit.

Finished cases are kept in docs/results/runs and not repeated while their settings stay the same: delete one to run it
again. --tables writes docs/results/STUDY.md from them. What was stopped goes on at its last checkpoints, in runs/, if
neither settings nor code changed since.
--quick runs seed 0 of ours (or --case) with a tenth of the training and keeps nothing: half an hour for all studies.

With --latency instead: goals in latency on scenes, without training, and what the pruned network then takes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import LONGER, OURS, PUBLISHED, SEQUENTIAL, STUDIES, Case, Study, settings
from pydantic import ValidationError
from rows import Row, finish, options

from compressor import compute, pipeline, recipe
from compressor.budgets import Budget, drop
from compressor.macs import count_macs
from compressor.pathway import extract
from compressor.progress import Reporter
from compressor.stages import STAGES
from compressor.stages.prune import Prune
from compressor.store import key_of
from compressor.trace import trace

ROOT = Path(__file__).resolve().parents[2]
RECIPES, RESULTS = Path(__file__).parent / "recipes", ROOT / "docs" / "results"
LATENCIES = 0.6, 0.4
GRADIENTS = 3  # loader passes that a round's gradients are counted as, forward and back, where no question is asked

Found = dict[str, Any]


def run(name: str, case: str, seed: int, share: float, folder: Path) -> Found:
    """One case's sizes, scores and drops; from the folder where it was run before."""
    study = STUDIES[name]
    how = study.cases[case]
    loaded, base = _loaded(study, seed, share)
    about = _about(loaded, how)
    file = folder / f"{_stem(name, case)}-{seed}.json"
    if file.exists() and _same((known := json.loads(file.read_text()))["about"], loaded, how):
        return dict(known)
    job = pipeline.prepare(loaded, base, Reporter(), builds=False)
    bench, original = job.bench, job.model
    begun, commit, unfinished = time.monotonic(), _commit(), ROOT / "runs" / f"{file.stem}-{key_of(about)[:12]}"
    with tempfile.TemporaryDirectory() as scratch, compute.threads(loaded.compute_threads):
        bench.before, bench.directory = bench.scores(original), Path(scratch)
        bench.checkpoints = unfinished if share == 1 else Path(scratch) / "checkpoints"
        networks = how(job)
    dense, parameters = count_macs(trace(original))[0], sum(value.numel() for value in original.module.parameters())
    scores, macs, effective, left, nonzero = dict[str, float](), 0, 0, 0, 0
    for tasks, model in networks.items():
        scores |= {task: score for task, score in bench.scores(model).items() if task in tasks}
        pathway = extract(model, list(tasks))
        macs, effective = macs + pathway.macs, effective + pathway.effective_macs
        names = dict(model.module.named_parameters())
        trained = [value for key, value in pathway.tensors.items() if key in names]
        left += sum(value.numel() for value in trained)
        nonzero += sum(int((value != 0).sum()) for value in trained)
    found = {
        "study": name, "case": case, "seed": seed, "about": about, "seconds": time.monotonic() - begun,
        "commit": commit, "notes": bench.notes, "asked": bench.asked, "before": dict(bench.before), "scores": scores,
        "drops": {t.name: drop(t, bench.before[t.name], scores[t.name]) for t in original.tasks},
        "macs": macs / dense, "effective": effective / dense, "parameters": left / parameters,
        "nonzero": nonzero / parameters,
    }
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(file)
    if share == 1:
        for folder in unfinished.parent.glob(f"{file.stem}-*"):
            shutil.rmtree(folder)
    return found


def _stem(name: str, case: str) -> str:
    return f"{name}-{case.replace(' ', '-').replace(',', '')}"


def _loaded(study: Study, seed: int, share: float = 1.0) -> tuple[recipe.Recipe, Path]:
    """The recipe at a seed, with so much of every training."""
    sets = [*study.sets, f"seed={seed}"]
    return recipe.load(RECIPES / f"{study.recipe}.toml", [*sets, *_shorter(study, sets, share)])


def _shorter(study: Study, sets: list[str], share: float) -> list[str]:
    """Overrides that leave so much of every training."""
    told = []
    for index, stage in enumerate(recipe.load(RECIPES / f"{study.recipe}.toml", sets)[0].stages):
        for key, at in (("steps", stage), ("recover.steps", stage), ("train.steps", stage)):
            found: Any = at
            for part in key.split("."):
                found = getattr(found, part, None)
            if share < 1 and found:
                told.append(f"stages.{index}.{key}={max(2, round(share * found))}")
    return told


def _about(loaded: recipe.Recipe, case: Case) -> Found:
    """The settings that a case's result depends on: the recipe's, and what the case changes in them."""
    found = loaded.model_dump_json(include={"workload", "stages", "budgets", "seed", "compute_threads"})
    return {**json.loads(found), "case": dict(settings(case))}


def _same(about: Found, loaded: recipe.Recipe, case: Case) -> bool:
    """Whether a run that was kept had these settings; one that was not there yet had its default."""
    try:
        stages = [STAGES[table["kind"]].model_validate(table) for table in about["stages"]]
        known = {key: value for key, value in about.items() if key != "case"}
        then = recipe.Recipe.model_validate(loaded.model_dump(mode="json") | known | {"stages": stages})
    except (KeyError, ValidationError):  # one that is gone
        return False
    return about.get("case") == settings(case) and _about(then, case) == _about(loaded, case)


def _commit() -> str:
    """The commit that is run, with a "+" where its code was changed since."""
    def git(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *given], cwd=ROOT, capture_output=True, text=True, check=False)

    changed = git("diff", "--quiet", "HEAD", "--", "compressor", "examples", "tools").returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + "+" * bool(changed)


# --- what is said of several seeds


def mean(runs: list[Found], *keys: str) -> float:
    def at(one: Any) -> float:
        for key in keys:
            one = one[key]
        return float(one)

    return sum(map(at, runs)) / len(runs)


def used(study: Study, runs: list[Found], task: str) -> float:
    """The mean drop in the unit of its bound: a fraction of the score, or the metric's own."""
    bound = Budget.parse(study.drops[task])
    return mean(runs, "drops", task) / (abs(mean(runs, "before", task)) if bound.relative else 1.0)


def worst(study: Study, runs: list[Found]) -> float:
    """The mean over runs of the largest drop, relative to the original's score: tasks' metrics have different units."""
    return sum(_largest(study, one) for one in runs) / len(runs)


def _largest(study: Study, one: Found) -> float:
    return max(float(one["drops"][task]) / abs(one["before"][task]) for task in study.drops)


def _asked(runs: list[Found], which: int = 0) -> int:
    """Questions that the runs' searches put to cut networks (0), or the groups that they were about (1)."""
    return sum(search[which] for one in runs for search in one["asked"])


def _passes(runs: list[Found]) -> float:
    """Loader passes that the searches of a run took, on average: a question is one."""
    rounds = sum(stage.get("rounds", 0) for one in runs for stage in one["about"]["stages"] if stage["kind"] == "prune")
    return (_asked(runs) or GRADIENTS * rounds) / len(runs)


def rows_of(name: str, found: dict[str, list[Found]]) -> list[Row]:
    study, rows = STUDIES[name], []
    for case, runs in found.items():
        ours = case == OURS
        sizes = {"macs": study.macs, "parameters": study.parameters, "effective": study.effective, "nonzero": None}
        for size, goal in sizes.items():
            rows.append(Row(f"{size} left", name, case, 0, mean(runs, size), goal if ours else None, most=True))
        for task, bound in study.drops.items():
            goal = Budget.parse(bound).amount if ours else None
            rows.append(Row(f"drop of {task}", name, case, 0, used(study, runs, task), goal, most=True))
        if case == SEQUENTIAL:
            rows.append(Row("questions a group", name, case, 0, _asked(runs) / _asked(runs, 1), 5.0, most=True))
        if case in (OURS, SEQUENTIAL) and PUBLISHED in found:
            fewer = _asked(found[PUBLISHED]) / len(found[PUBLISHED]) / _passes(runs)
            rows.append(Row("passes of PAGCP as published over ours", name, case, 0, fewer, 3.0, most=False))
            ahead = worst(study, found[PUBLISHED]) - worst(study, runs)
            rows.append(Row("worst drop of PAGCP as published, less ours", name, case, 0, ahead, 0.0, most=False))
        if case not in (OURS, LONGER) and OURS in found:
            ahead = worst(study, runs) - worst(study, found[OURS])
            as_small = all(mean(runs, size) <= goal for size, goal in sizes.items() if goal is not None)
            rows.append(Row("worst drop, less ours", name, case, 0, ahead, 0.0 if as_small else None, most=False))
    return rows


def table(name: str, found: dict[str, list[Found]]) -> str:
    """Markdown: a row a case, means over its seeds, and how far they spread where there are several."""
    study = STUDIES[name]

    def cell(values: list[float], unit: str) -> str:
        scale, digits, sign = (100.0, 1, " %") if unit == "%" else (1.0, 4, "")
        low, high = (f"{scale * value:+.{digits}f}" for value in (min(values), max(values)))
        spread = f" ({low} to {high})" if len(values) > 1 else ""
        return f"{scale * sum(values) / len(values):+.{digits}f}{sign}{spread}"

    goals = [f"{text} {share:.0%}" for text, share in (
        ("MACs", study.macs), ("parameters", study.parameters), ("effective MACs", study.effective)
    ) if share is not None]
    goals += [f"{task} drops by at most {bound}" for task, bound in study.drops.items()]
    steps = next(iter(found.values()))[0]["about"]["stages"]
    training = " + ".join(_trainings(stage) for stage in steps)
    commits = ", ".join(sorted({one["commit"] for runs in found.values() for one in runs}))
    lines = [
        f"# {study.title}", "",
        f"`tools/bench/compression.py {name} --tables`, recipe `tools/bench/recipes/{study.recipe}.toml`"
        f"{' with ' + ', '.join(f'`{text}`' for text in study.sets) if study.sets else ''}, on the CPU. "
        f"Training steps: {training}. Asked of ours: {'; '.join(goals)}.", "",
        "Drops are against the original network on the validate split, positive is worse, in parts of its score where "
        "the bound is one and else in the metric's unit; means over seeds, with the extremes. Effective multiply-adds "
        f"are those whose weight is not zero. Run at commit {commits}.", "",
        f"| case | seeds | MACs | effective | parameters | not zero | {' | '.join(study.drops)} | worst, relative |",
        f"|{'---|' * (7 + len(study.drops))}",
    ]
    for case, runs in found.items():
        sizes = [f"{100 * mean(runs, key):.1f} %" for key in ("macs", "effective", "parameters", "nonzero")]
        drops = []
        for task, text in study.drops.items():
            relative = Budget.parse(text).relative
            values = [one["drops"][task] / (abs(one["before"][task]) if relative else 1.0) for one in runs]
            drops.append(cell(values, "%" if relative else ""))
        most = cell([_largest(study, one) for one in runs], "%")
        seeds = " ".join(str(one["seed"]) for one in runs)
        lines.append(f"| {' | '.join([case, seeds, *sizes, *drops, most])} |")
    every = [(case, one["seed"], note) for case, runs in found.items() for one in runs for note in one["notes"]]
    notes = [f"- {case}, seed {seed}: {note}" for case, seed, note in every]
    notes += [
        f"- {case}: {_asked(runs)} questions to cut networks about {_asked(runs, 1)} groups, over all searches; "
        "a question is one pass over what the search judges by"
        for case, runs in found.items() if any(one["asked"] for one in runs)
    ]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _trainings(stage: Found) -> str:
    if stage["kind"] == "finetune":
        return f"finetune {stage['steps']}"
    inner = stage.get("recover") or stage.get("train")
    return f"{stage['kind']} {stage['rounds']} x {inner['steps'] if inner else 0}"


def latency() -> list[Row]:
    """Latency reached over latency asked for, timed once more when the stage is over."""
    rows = []
    for goal in LATENCIES:
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


def main() -> None:
    parser = options(__doc__)
    cases = list(dict.fromkeys(case for study in STUDIES.values() for case in study.cases))
    parser.add_argument("study", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)}; without one, all")
    parser.add_argument("--case", nargs="+", choices=cases, help="only these cases, where a study has them")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="write docs/results/STUDY.md")
    parser.add_argument("--latency", action="store_true", help="only goals in latency")
    given = parser.parse_args()
    if unknown := [name for name in given.study if name not in STUDIES]:
        parser.error(f"no study '{unknown[0]}'; there are {', '.join(STUDIES)}")
    if given.latency:
        finish(latency(), given.json)
        return
    rows = []
    with tempfile.TemporaryDirectory() as nowhere:
        share, seeds, folder = (0.1, [0], Path(nowhere)) if given.quick else (1.0, given.seed, RESULTS / "runs")
        for name in given.study or STUDIES:
            wanted = given.case or ([OURS] if given.quick else STUDIES[name].cases)
            chosen = [case for case in STUDIES[name].cases if case in wanted]
            found = {case: [run(name, case, seed, share, folder) for seed in seeds] for case in chosen}
            rows += rows_of(name, found)
            if given.tables and not given.quick and (finished := _finished(name, folder)):
                (RESULTS / f"{name}.md").write_text(table(name, finished))
    finish(rows, given.json)
    print(f"seeds {', '.join(map(str, seeds))}; {round(share * 100)} % of the training", file=sys.stderr)


def _finished(name: str, folder: Path) -> dict[str, list[Found]]:
    """Every finished case of a study, in its order, as its settings are now."""
    study, found = STUDIES[name], {}
    for case, how in study.cases.items():
        every = [json.loads(file.read_text()) for file in folder.glob(f"{_stem(name, case)}-[0-9]*.json")]
        runs = [one for one in every if _same(one["about"], _loaded(study, one["seed"])[0], how)]
        if runs:
            found[case] = sorted(runs, key=lambda one: int(one["seed"]))
    return found


if __name__ == "__main__":
    main()
