"""What the compression benchmark runs: studies (a recipe and what it must reach) and the cases of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import controls

from compressor.budgets import drop
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.pipeline import Job
from compressor.stages.finetune import Finetune
from compressor.stages.prune import Prune
from compressor.stages.ticket import Ticket
from compressor.training import Training, train

OURS, LONGER = "ours", "original, trained on"
SEQUENTIAL, PUBLISHED = "sequential", "PAGCP, as published"
MAGNITUDES, LEAST_WIDTHS = ("magnitude", "magnitude-l1", "magnitude-group"), (0.1, 0.25, 0.4)

Case = Callable[[Job], Mapping[tuple[str, ...], MultiTaskModel]]
"""Networks by the tasks that each answers: mostly one for all tasks."""


@dataclass(frozen=True, slots=True)
class Study:
    """One recipe of `recipes/`, with what its result must reach.

    Attributes:
        macs, parameters: largest shares of the original's that may be left; None where nothing is asked.
        effective: largest share of the original's multiply-adds left that have a weight which is not zero.
        drops: largest accepted drop by task, as a budget.
    """

    recipe: str
    cases: Mapping[str, Case]
    drops: Mapping[str, str]
    sets: Sequence[str] = ()
    macs: float | None = None
    parameters: float | None = None
    effective: float | None = None
    title: str = ""


def stages(job: Job, **settings: object) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """The recipe's stages, some settings changed in those that have them."""
    model = job.model
    for stage in job.recipe.stages:
        known = {key: value for key, value in settings.items() if hasattr(stage, key)}
        changed = type(stage).model_validate(stage.model_dump() | known)  # type: ignore[attr-defined]
        model = changed.run(model, job.bench)
    return _all(job, model)


def settings(case: Case) -> Mapping[str, object]:
    """What a case changes in the recipe's stages, where that is all it does."""
    return case.keywords if isinstance(case, partial) else {}


def published(job: Job) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """PAGCP as published, with the recipe's recovery and fine-tuning."""
    prune, tune = _prune(job), _tune(job)
    assert prune.recover is not None and prune.macs is not None
    found = controls.Published(prune.macs, prune.recover).run(job.model.clone(), job.bench)
    return _all(job, tune.run(found, job.bench))


def tuned_magnitude(job: Job) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """Magnitude at its best: of every criterion of it and least width, what reaches the goal and then loses least."""
    prune, bench = _prune(job), job.bench
    worst = dict[tuple[str, float], float]()
    pruned = dict[tuple[str, float], tuple[MultiTaskModel, list[str]]]()
    for found in product(MAGNITUDES, LEAST_WIDTHS):
        bench.short, bench.notes = False, []
        known = {"criterion": found[0], "keep_at_least": found[1], "weights": {}}
        model = prune.model_copy(update=known).run(job.model, bench)
        if not bench.short:
            pruned[found], scores, before = (model, bench.notes), bench.scores(model), bench.before
            worst[found] = max(drop(t, before[t.name], scores[t.name]) / abs(before[t.name]) for t in job.model.tasks)
    if not worst:
        raise CompressError("no magnitude at any least width reaches the goal")
    best = min(worst, key=lambda found: worst[found])
    model, bench.notes = pruned[best]
    bench.note(f"criterion {best[0]}, no group below {best[1]:.0%}: worst task {worst[best]:+.1%} before fine-tuning.")
    return _all(job, _tune(job).run(model, bench))


def scratch(job: Job) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """The shape that `prune` finds without recovery, with fresh weights, trained for all the steps ours is given."""
    return _all(job, controls.from_scratch(_shape(job), job.bench, _whole_training(job)))


def longer(job: Job) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """The whole network, trained on for as many steps: what of a gain is only more training."""
    found = job.model.clone()
    train(found, job.bench, _whole_training(job), "longer", job.bench.seed)
    return _all(job, found)


def singles(job: Job) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """For each task a network of its own, of that shape, with fresh weights, trained and chosen by this task alone."""
    shape, how, names = _shape(job), _whole_training(job), [task.name for task in job.model.tasks]
    found: dict[tuple[str, ...], MultiTaskModel] = {}
    for name in names:
        alone = replace(job.bench, budgets={name: job.bench.budgets[name]})
        weights = {other: float(other == name) for other in names}
        found[(name,)] = controls.from_scratch(shape, alone, how.model_copy(update={"loss_weights": weights}))
    return found


def random_ticket(job: Job) -> Mapping[tuple[str, ...], MultiTaskModel]:
    """Masks at random places, layer by layer as dense as a ticket of one round without training."""
    return _all(job, controls.random_masks(job.model, job.bench, _ticket(job), _whole_training(job)))


CHANNELS: Mapping[str, Case] = {
    OURS: stages,
    "uniform width": partial(stages, search="uniform", criterion="magnitude", weights={}),
    "magnitude": partial(stages, criterion="magnitude", weights={}),  # which heeds no task
    "magnitude, tuned": tuned_magnitude,
    PUBLISHED: published,
    SEQUENTIAL: partial(stages, search="sequential", slack=60.0),
    "from scratch": scratch,
    "single tasks": singles,
    LONGER: longer,
}
TICKETS: Mapping[str, Case] = {
    OURS: stages,
    "by tasks": partial(stages, saliency="tasks"),
    "same in every layer": partial(stages, scope="layer"),
    "random places": random_ticket,
    LONGER: longer,
}
BY_LAYERS = {"by layers" if case == "by tasks" else case: how for case, how in TICKETS.items()}
BY_LAYERS["by layers"] = partial(stages, saliency="layers")
BOTH: Mapping[str, Case] = {
    OURS: stages,
    "uniform width": partial(stages, search="uniform", criterion="magnitude", weights={}, scope="layer"),
    LONGER: longer,
}

_SCENES = {"segmentation": "2 %", "depth": "2 %", "normals": "2 %"}
_FASHION = {"left": "2 %", "right": "2 %"}
_RESTORATION = dict.fromkeys(["denoise15", "denoise25", "denoise50", "deblock", "upscale2"], "0.05")
_FIVE = ["stages.0.keep_ratio=0.05"]

STUDIES: Mapping[str, Study] = {
    "scenes-channels": Study(
        "scenes-channels", CHANNELS, _SCENES, macs=0.35, parameters=0.35, title="Scenes: channel pruning"
    ),
    "dronet-channels": Study(
        "dronet-channels", CHANNELS, {"steering": "3 %", "collision": "0.005"}, macs=0.30, parameters=0.25,
        title="DroNet: channel pruning",
    ),
    "scenes-ticket": Study(
        "scenes-ticket", TICKETS, dict.fromkeys(_SCENES, "0 %"), title="Scenes: a ticket of 10 % of the weights"
    ),
    "scenes-ticket-5": Study(
        "scenes-ticket-5", BY_LAYERS, _SCENES, title="Scenes: a ticket of 5 % of the weights"
    ),
    "scenes-both": Study(
        "scenes-both", BOTH, _SCENES, effective=0.12, title="Scenes: channels, then weights"
    ),
    "fashion-ticket": Study(
        "fashion-ticket", BY_LAYERS, dict.fromkeys(_FASHION, "0"), sets=["stages.1.loss_weights.right=1.15"],
        title="MultiFashion: a ticket of 10 % of the weights",
    ),
    "fashion-ticket-5": Study(
        "fashion-ticket", BY_LAYERS, _FASHION, sets=[*_FIVE, "stages.1.steps=2574"],
        title="MultiFashion: a ticket of 5 % of the weights",
    ),
    "restoration-ticket": Study(
        "restoration-ticket", TICKETS, _RESTORATION, title="Restoration: a ticket of 10 % of the weights"
    ),
}


def _all(job: Job, model: MultiTaskModel) -> Mapping[tuple[str, ...], MultiTaskModel]:
    return {tuple(task.name for task in job.model.tasks): model}


def _shape(job: Job) -> MultiTaskModel:
    return _prune(job).model_copy(update={"recover": None}).run(job.model, job.bench)


def _prune(job: Job) -> Prune:
    return next(stage for stage in job.recipe.stages if isinstance(stage, Prune))


def _ticket(job: Job) -> Ticket:
    return next(stage for stage in job.recipe.stages if isinstance(stage, Ticket))


def _tune(job: Job) -> Finetune:
    return next(stage for stage in job.recipe.stages if isinstance(stage, Finetune))


def _whole_training(job: Job) -> Training:
    """The last stage's training, as many steps of it as all stages take together."""
    steps = sum(stage.train_steps for stage in job.recipe.stages)
    return Training(**_tune(job).model_dump(exclude={"kind"})).model_copy(update={"steps": steps})
