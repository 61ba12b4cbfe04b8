"""Search over a recipe's settings for networks of which none is both smaller and better: its Pareto front.

Optuna proposes settings and keeps every trial in SQLite, so that a sweep goes on where it was stopped. A trial runs the
recipe's stages, builds nothing, and has two figures: the share of multiply-adds that is left and not zero, and what the
task nearest its end has left of its budget, as a share of it. Workers are given settings and return figures; only the
process that was asked for the sweep opens the database, so a file serves any number of workers on any machines.
"""

import json
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import tomli_w

from compressor import compute, pipeline
from compressor import recipe as recipes
from compressor.errors import CompressError
from compressor.progress import Reporter, Silent
from compressor.recipe import Choices, Recipe
from compressor.report import front
from compressor.report.page import replace_together
from compressor.report.search import Failure, Goal, Point, Sweep, nondominated
from compressor.store import opened
from compressor.workers import Failed, in_processes, on_ray
from profiles.errors import ProfileError
from targets.errors import TargetError

DATABASE, CHOSEN = "sweep.db", "chosen.toml"
State = optuna.trial.TrialState


@dataclass(frozen=True, slots=True)
class Trial:
    """What a worker is given: a recipe, its overrides, the settings to try, and the folder to run them in."""

    number: int
    recipe: Path
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial came to: figures as in `Point`, and the scores of the original."""

    work: float
    margin: float
    before: Mapping[str, float]
    scores: Mapping[str, float]
    seconds: float


def sweep(
    path: Path,
    overrides: Sequence[str],
    out: Path,
    trials: int,
    workers: int,
    progress: Reporter,
    *,
    ray: str | None = None,
    command: str = "",
) -> Sweep:
    """Run as many trials as earlier finished ones leave; write `sweep.json`, `sweep.html` and `chosen.toml`.

    The first has the recipe's own settings, if they lie inside what is searched: no sweep is worse than its recipe.
    Trials that were under way when a sweep was killed come next, and go on with the stages they had finished. One that
    fails is still missing when the command is given again.

    Args:
        workers: trials at a time: one in this process, several in as many others.
        ray: the address of a Ray cluster that runs the trials instead.

    Raises:
        CompressError: no [sweep] or no budgets, a setting that does not exist, another sweep in the folder, no Ray or
            no cluster there, or every trial failed.
    """
    recipe, job = _prepared(path, overrides)
    with opened(out, resume=True):
        search = _Search(path, overrides, out, recipe, job.start)
        search.enqueue()
        missing = max(0, trials - search.finished)
        given = search.trials(missing, progress)
        with closing(_outcomes(given, min(workers, missing), ray, progress)) as outcomes:
            for trial, outcome in outcomes:
                if isinstance(outcome, Outcome) and not trial.folder.is_dir():
                    outcome = Failed(f"'{trial.folder}' is not here: --out must be a folder that all machines share.")
                search.tell(trial, outcome)
                progress.line(f"Trial {trial.number}: {_told(outcome)}")
        found = search.found(job, command)
        texts = front.texts(found)
        if found.chosen is not None:
            texts[CHOSEN] = _chosen(found, path, overrides)
        replace_together(texts, out)
    return found


def plan(path: Path, overrides: Sequence[str], out: Path, trials: int) -> dict[str, Any]:
    """What `sweep` would do: what it searches, how many trials are missing, and about how long one trains.

    Trains a few steps on a copy to say how long; writes nothing.

    Raises:
        CompressError: as `sweep`.
    """
    recipe, job = _prepared(path, overrides)
    finished = _Search(path, overrides, out, recipe, job.start).finished if (out / DATABASE).exists() else 0
    own = _own(recipe)
    return {
        "searched": [
            {"setting": key, "over": str(choices), "own": recipes.setting(recipe, key)}
            for key, choices in recipe.sweep.items()
        ],
        "own_first": len(own) == len(recipe.sweep),
        "finished": finished,
        "missing": max(0, trials - finished),
        "seconds": sum(stage["seconds"] for stage in pipeline.dry_run(job, out)["stages"]),
    }


def _prepared(path: Path, overrides: Sequence[str]) -> tuple[Recipe, pipeline.Job]:
    compute.alone("sweep")
    recipe, base = recipes.load(path, overrides)
    if not recipe.sweep:
        raise CompressError("The recipe has no [sweep]: name the settings to search, such as 'stages.0.macs'.")
    if not recipe.budgets:
        raise CompressError("A sweep weighs work against budgets, and the recipe has none; give [budgets].")
    _own(recipe)
    return recipe, pipeline.prepare(recipe, base, Silent(), builds=False)


def _own(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own values of what is searched, as far as they lie inside it."""
    own = {key: choices.fitted(recipes.setting(recipe, key)) for key, choices in recipe.sweep.items()}
    return {key: value for key, value in own.items() if value is not None}


class _Search:
    """A sweep's folder and the study in it: what to try next, and what came of it."""

    def __init__(self, path: Path, overrides: Sequence[str], out: Path, recipe: Recipe, start: str) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self.path, self.overrides, self.out, self.recipe = path.resolve(), tuple(overrides), out.resolve(), recipe
        self.study = optuna.create_study(
            storage=f"sqlite:///{self.out / DATABASE}",
            study_name="sweep",
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )
        self.asked: dict[int, optuna.Trial] = {}
        asked = json.dumps([str(self.path), list(overrides), recipe.model_dump(mode="json"), start])
        known = self.study.user_attrs.get("asked")
        if known is None:
            self.study.set_user_attr("asked", asked)
        elif known != asked:
            raise CompressError(
                f"'{out}' holds the sweep of another recipe, or of this one before it, its workload or its checkpoint "
                "changed."
            )

    @property
    def finished(self) -> int:
        return len(self._of(State.COMPLETE))

    def enqueue(self) -> None:
        """What is tried before anything is proposed: the recipe's own settings, and the trials of a killed sweep."""
        own = _own(self.recipe)
        if len(own) == len(self.recipe.sweep) and not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(own, user_attrs={"own": True})
        for stale in self._of(State.RUNNING):
            kept = {"folder": f"trials/{stale.number}", **stale.user_attrs}
            self.study.tell(stale.number, state=State.FAIL)
            if params := stale.params or stale.system_attrs.get("fixed_params"):  # else killed before it was proposed
                self.study.enqueue_trial(params, user_attrs=kept)

    def trials(self, count: int, progress: Reporter) -> Iterator[Trial]:
        """So many trials, each proposed when it is taken. What is proposed follows from the seed and earlier trials."""
        for _ in range(count):
            failed = [trial for trial in self._of(State.FAIL) if "why" in trial.user_attrs]  # the others were killed
            number = len(self._of(State.RUNNING, State.COMPLETE)) + len(failed)
            seed = np.random.SeedSequence([self.recipe.seed, number]).generate_state(1)[0]
            self.study.sampler = optuna.samplers.TPESampler(seed=int(seed))
            asked = self.study.ask()
            settings = {key: _proposed(asked, key, choices) for key, choices in self.recipe.sweep.items()}
            folder = asked.user_attrs.get("folder", f"trials/{asked.number}")
            asked.set_user_attr("settings", settings)
            asked.set_user_attr("folder", folder)
            self.asked[asked.number] = asked
            progress.line(f"Trial {asked.number}: {', '.join(f'{k} = {front.value(v)}' for k, v in settings.items())}")
            yield Trial(asked.number, self.path, self.overrides, settings, self.out / folder)

    def tell(self, trial: Trial, outcome: Outcome | Failed) -> None:
        """Keep what a trial came to."""
        asked = self.asked.pop(trial.number)
        if isinstance(outcome, Failed):
            asked.set_user_attr("why", outcome.why)
            self.study.tell(asked, state=State.FAIL)
            return
        for name in ("before", "scores", "seconds"):
            asked.set_user_attr(name, getattr(outcome, name))
        self.study.tell(asked, [outcome.work, outcome.margin])

    def found(self, job: pipeline.Job, command: str) -> Sweep:
        """All trials so far.

        Raises:
            CompressError: none was finished.
        """
        failed = tuple(
            Failure(number=t.number, settings=t.user_attrs["settings"], why=t.user_attrs["why"])
            for t in self._of(State.FAIL)
            if "why" in t.user_attrs
        )
        done = sorted(self._of(State.COMPLETE), key=lambda t: (t.values[0], -t.values[1], t.number))
        if not done:
            raise CompressError(f"No trial of the sweep was finished: {failed[0].why if failed else 'none was begun'}")
        best = nondominated((t.values[0], t.values[1]) for t in done)
        points = tuple(
            Point(
                number=t.number,
                work=t.values[0],
                margin=t.values[1],
                front=(t.values[0], t.values[1]) in best,
                **{name: t.user_attrs[name] for name in ("settings", "scores", "seconds", "folder")},
            )
            for t in done
        )
        before, budgets = done[0].user_attrs["before"], job.bench.budgets
        return Sweep(
            name=self.recipe.name,
            command=command,
            recipe=self.recipe.model_dump(mode="json"),
            seed=self.recipe.seed,
            created=datetime.now(UTC),
            searched={key: str(choices) for key, choices in self.recipe.sweep.items()},
            tasks=tuple(
                Goal(
                    name=task.name,
                    metric=task.metric,
                    higher_is_better=task.higher_is_better,
                    before=before.get(task.name),
                    budget=budgets[task.name].allowed(before[task.name]) if task.name in budgets else None,
                    budget_text=str(budgets[task.name]) if task.name in budgets else "",
                )
                for task in job.model.tasks
            ),
            trials=points,
            chosen=next((point.number for point in points if point.margin >= 0), None),
            own=next((t.number for t in done if "own" in t.user_attrs), None),
            failed=failed,
        )

    def _of(self, *states: State) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)


def _outcomes(
    trials: Iterator[Trial], workers: int, ray: str | None, progress: Reporter
) -> Generator[tuple[Trial, Outcome | Failed]]:
    if ray is not None and workers:
        yield from on_ray(trials, attempt, workers, ray)
    elif workers > 1:
        yield from in_processes(trials, attempt, workers)
    else:
        for trial in trials:
            try:
                outcome = attempt(trial, progress)
            except Exception as error:  # told to the study, so that it is not the first to be tried again
                yield trial, Failed(f"{type(error).__name__}: {error}")
                raise
            yield trial, outcome


def attempt(trial: Trial, progress: Reporter | None = None) -> Outcome | Failed:
    """Run a trial's stages in its folder."""
    begun = time.monotonic()
    told = [*trial.overrides, *_overrides(trial.settings)]
    try:
        job = pipeline.prepare(*recipes.load(trial.recipe, told), progress or Silent(), builds=False)
        model, scores = pipeline.compress(job, trial.folder)
    except (CompressError, TargetError, ProfileError) as error:
        return Failed(str(error))
    margin = min(job.bench.shares(scores).values())
    work = pipeline.work_left(job.model, model)
    return Outcome(work, margin, job.bench.before, scores, time.monotonic() - begun)


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _proposed(trial: optuna.Trial, key: str, choices: Choices) -> Any:
    if choices.choices:
        return trial.suggest_categorical(key, list(choices.choices))
    low, high = choices.low, choices.high
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=choices.log)
    assert low is not None and high is not None  # the recipe was checked
    return trial.suggest_float(key, low, high, log=choices.log)


def _told(outcome: Outcome | Failed) -> str:
    if isinstance(outcome, Failed):
        return f"failed: {outcome.why}"
    return f"work {outcome.work:.1%}, least left of a budget {front.share(outcome.margin)}"


def _chosen(found: Sweep, path: Path, overrides: Sequence[str]) -> str:
    """The recipe of the trial that is taken, under a line that says where it comes from."""
    point = found.taken
    where = repr(str(path.resolve()))
    origin = f"# Trial {point.number} of the sweep of {where}: {point.work:.1%} of the work is left.\n"
    return origin + tomli_w.dumps(recipes.portable(path, [*overrides, *_overrides(point.settings)]))
