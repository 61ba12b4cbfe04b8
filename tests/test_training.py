"""The training loop and batch-norm statistics: what is learnt from, what is held, what repeats."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import plain
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import compressor.checkpoint as checkpoint_module
import compressor.training as training_module
from compressor import compute, pipeline, recipe, sweep
from compressor.averaging import Average
from compressor.bench import Bench, reestimate_batchnorm, rehearse
from compressor.errors import CompressError
from compressor.model import MultiTaskModel
from compressor.training import Training, _gap, train
from compressor.weighting import Rule, Weighting
from compressor.workload import Batch, Split


class Unlabelled(tiny.Tiny):
    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        return (Batch(batch.inputs) for batch in super().batches(split, seed))


@pytest.fixture
def trained() -> MultiTaskModel:
    return tiny.model()


@pytest.fixture
def bench(trained: MultiTaskModel, tmp_path: Path) -> Bench:
    return tiny.bench(trained, tmp_path)


def disturbed(model: MultiTaskModel, by: float = 0.1) -> MultiTaskModel:
    copy = model.clone()
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in copy.module.parameters():
            parameter.add_(by * parameter.std(correction=0) * torch.randn(parameter.shape, generator=chance))
    return copy


def state(model: MultiTaskModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def gap_to(original: MultiTaskModel, model: MultiTaskModel) -> dict[str, float]:
    """Mean squared difference of each task's answers on fresh pictures."""
    image, _ = tiny.pictures(64, torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, given = original.answers(image), model.answers(image)
    return {name: float((given[name] - wanted[name]).square().mean()) for name in wanted}


def test_without_any_label_every_task_learns_from_the_original(trained: MultiTaskModel, tmp_path: Path) -> None:
    bench = Bench(Unlabelled(), trained, {}, 4, 0, tiny.Silent(), directory=tmp_path)
    student = disturbed(trained)
    before = gap_to(trained, student)
    train(student, bench, Training(steps=40, learning_rate=2e-3), "x", 0)
    after = gap_to(trained, student)
    assert all(after[name] < 0.7 * before[name] for name in before), (before, after)


def test_nothing_to_learn_is_refused(trained: MultiTaskModel) -> None:
    bench = Bench(Unlabelled(), trained, {}, 4, 0, tiny.Silent())
    with pytest.raises(CompressError, match=r"offers nothing to learn: labels for no task, distill = 'never'"):
        train(trained.clone(), bench, Training(steps=1, distill="never"), "x", 0)


def test_an_empty_train_split_is_refused(
    trained: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.workload, "batches", lambda split, seed: iter(()))
    with pytest.raises(CompressError, match="no batch in its train split"):
        train(trained.clone(), bench, Training(steps=1), "x", 0)
    with pytest.raises(CompressError, match="no batch in its calibrate split"):
        bench.calibration(2)


def test_a_loss_weight_for_no_task_is_refused(trained: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match=r"loss_weights: no task 'sise'. Did you mean 'size'\?"):
        train(trained.clone(), bench, Training(steps=1, loss_weights={"sise": 1.0}), "x", 0)


def test_a_loss_that_explodes_is_told(trained: MultiTaskModel, bench: Bench) -> None:
    model = trained.clone()
    with torch.no_grad():
        next(model.module.parameters()).fill_(float("nan"))
    with pytest.raises(CompressError, match=r"finetune: the loss became nan at step 0; lower learning_rate"):
        train(model, bench, Training(steps=2), "finetune", 0)


def test_a_weight_of_zero_silences_a_task(trained: MultiTaskModel, bench: Bench) -> None:
    model = trained.clone()
    mute = dict.fromkeys(("kind", "size", "mask"), 0.0)
    train(model, bench, Training(steps=3, loss_weights=mute), "x", 0)
    assert all(torch.equal(p, q) for p, q in zip(model.module.parameters(), trained.module.parameters(), strict=True))


def test_the_same_seed_gives_the_same_weights_bit_for_bit(trained: MultiTaskModel, bench: Bench) -> None:
    found = []
    for seed in (3, 3, 4):
        model = disturbed(trained)
        train(model, bench, Training(steps=6, weight_decay=0.01), "x", seed)
        found.append(state(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_masked_weights_stay_exactly_zero_and_take_no_part(trained: MultiTaskModel, bench: Bench) -> None:
    model = trained.clone()
    mask = torch.rand(model.module.down[0].weight.shape, generator=torch.Generator().manual_seed(0)) > 0.7
    model.masks = {"down.0.weight": mask}
    model.module.down[0].weight.data.mul_(mask)
    train(model, bench, Training(steps=8, learning_rate=1e-2, weight_decay=0.1), "x", 0)
    weight = model.module.down[0].weight
    assert bool((weight[~mask] == 0).all())
    assert bool((weight[mask] != trained.module.down[0].weight[mask]).any())


def test_a_snapshot_is_the_state_after_so_many_steps(trained: MultiTaskModel, bench: Bench) -> None:
    how = Training(steps=4)
    long, at_start = disturbed(trained), state(disturbed(trained))
    assert all(torch.equal(v, at_start[n]) for n, v in (train(disturbed(trained), bench, how, "x", 0, 0) or {}).items())
    saved = train(long, bench, how, "x", 0, snapshot=4)
    assert saved is not None and all(torch.equal(value, saved[name]) for name, value in state(long).items())
    early = train(disturbed(trained), bench, how, "x", 0, snapshot=2)
    assert early is not None and not torch.equal(early["stem.0.weight"], saved["stem.0.weight"])


def test_bf16_trains_float_weights(trained: MultiTaskModel, bench: Bench) -> None:
    model = disturbed(trained)
    train(model, bench, Training(steps=2, precision="bf16", distill="always"), "x", 0)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("taught", [torch.full((4, 1), 2.0), torch.full((1, 1), 2.0), torch.zeros(3, 2)])
def test_distillation_is_finite_where_the_teacher_does_not_vary(taught: torch.Tensor) -> None:
    assert _gap(taught.clone(), taught) == 0
    assert _gap(taught + 0.1, taught).isfinite()


# --- batch norm


def test_batch_norm_is_replaced_by_plain_averages(trained: MultiTaskModel, bench: Bench) -> None:
    module, batches = trained.clone().module, bench.calibration(3)
    norm = module.stem[1]
    norm.running_mean.fill_(7.0)
    reestimate_batchnorm(module, batches)
    with torch.no_grad():
        means = torch.stack([module.stem[0](batch.inputs[0]).mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-5)
    assert norm.momentum == 0.1 and not module.training and not norm.training


def test_training_leaves_batch_norm_at_plain_averages_over_its_last_steps(
    trained: MultiTaskModel, bench: Bench
) -> None:
    model, seen = trained.clone(), []
    model.module.stem[0].register_forward_hook(
        lambda layer, _, out: seen.append(out.detach().mean((0, 2, 3))) if layer.training else None
    )
    train(model, bench, Training(steps=30, learning_rate=1e-12), "settle", 0)
    assert len(seen) == 30
    assert torch.allclose(model.module.stem[1].running_mean, torch.stack(seen[-20:]).mean(0), atol=1e-5)
    assert model.module.stem[1].momentum == trained.module.stem[1].momentum


def test_each_check_sees_batch_norm_at_plain_averages_over_the_steps_before_it(
    trained: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No average reaches back over a check; the last is of all steps since one, where it would have a check inside."""
    bench = tiny.bench(trained, tmp_path, size=0.05)
    model, seen, means = trained.clone(), [], []
    model.module.stem[0].register_forward_hook(
        lambda layer, _, out: seen.append(out.detach().mean((0, 2, 3))) if layer.training else None
    )

    def scores(candidate: MultiTaskModel) -> dict[str, float]:
        means.append(candidate.module.stem[1].running_mean.clone())
        return dict(bench.before)

    monkeypatch.setattr(bench, "scores", scores)
    train(model, bench, Training(steps=85, learning_rate=1e-12, check_every=25), "settle", 0)
    assert len(seen) == 85
    for mean, first, done in zip(means, (5, 30, 50, 50), (25, 50, 75, 85), strict=True):
        assert torch.allclose(mean, torch.stack(seen[first:done]).mean(0), atol=1e-5), done


def test_batch_norm_that_keeps_no_statistics_is_left_alone(bench: Bench) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    reestimate_batchnorm(module, bench.calibration(1))
    assert module[1].running_mean is None


# --- scores and the rehearsal


def break_labels(bench: Bench, monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    plain = tiny.Tiny()
    monkeypatch.setattr(bench.workload, "batches", lambda split, seed: map(change, plain.batches(split, seed)))  # type: ignore[arg-type]


def relabel(name: str, value: object) -> object:
    return lambda batch: replace(batch, labels={name: value, **{k: v for k, v in batch.labels.items() if k != name}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (relabel("kinds", torch.zeros(32)), r"for no task: 'kinds'. Did you mean 'kind'\?"),
        (lambda batch: batch.inputs, r"yields a tuple, not a workload.Batch"),
        (lambda batch: replace(batch, inputs=(batch.inputs[0][:, 0],)), r"first batch of the train split fails: "),
        (
            relabel("size", torch.full((32, 1), torch.nan)),
            "loss of task 'size' .* should be one finite number, not nan",
        ),
        (relabel("kind", torch.zeros(3)), "first batch of the train split fails: "),
    ],
)
def test_a_faulty_batch_shows_before_the_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: object, message: str
) -> None:
    break_labels(bench, monkeypatch, change)
    with pytest.raises(CompressError, match=message):
        rehearse(bench, ("train",))


def test_losses_for_no_task_and_losses_of_many_numbers_show(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for losses, message in (({"siz": torch.zeros(())}, "losses.. names no task: 'siz'"),
                            ({"size": torch.zeros(2)}, r"should be one finite number, not \(2,\)")):  # fmt: skip
        monkeypatch.setattr(bench.workload, "losses", lambda outputs, batch, given=losses: given)
        with pytest.raises(CompressError, match=message):
            rehearse(bench, ("train", "calibrate"))


def test_scores_are_of_labelled_tasks_only(
    trained: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tiny.bench(trained, tmp_path)
    break_labels(
        bench, monkeypatch, lambda batch: replace(batch, labels={k: v for k, v in batch.labels.items() if k == "size"})
    )
    del bench.validation
    assert list(bench.scores(trained)) == ["size"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (relabel("kind", torch.zeros(31)), r"Task 'kind' answers with shape \(32, 3\); its metric cannot take that"),
        (
            relabel("size", torch.full((32, 1), torch.nan)),
            r"score of task 'size' is nan: are there NaN among its labels",
        ),
        (lambda batch: replace(batch, labels={}), "Task 'size' has a budget, but no label in the validate split"),
        (
            lambda batch: replace(batch, inputs=(batch.inputs[0] * torch.nan,)),
            "answers NaN or infinity on the validate",
        ),
    ],
)
def test_what_cannot_be_scored_is_told(
    trained: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, message: str
) -> None:
    bench = tiny.bench(trained, tmp_path, size=1)
    break_labels(bench, monkeypatch, change)
    del bench.validation
    with pytest.raises(CompressError, match=message):
        bench.scores(trained)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": 0.9},
        {"weighting": "uncertainty"},
        {"weighting": "progress"},
        {"weighting": "margins", "check_every": 5, "patience": 9, "ema": 0.5},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("at", [0, 3, 13])
def test_a_training_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    trained: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, settings: dict[str, object]
) -> None:
    """With dropout, so that the random generator matters, masks held, and a snapshot taken on the way."""
    how = Training.model_validate({"steps": 24, "learning_rate": 5e-3, "weight_decay": 0.1, **settings})
    bench = tiny.bench(trained, tmp_path, size=0.05, mask=0.05)
    start = disturbed(trained)
    start.module.stem.append(nn.Dropout(0.2))
    start.masks = {"down.0.weight": torch.rand(start.module.down[0].weight.shape) > 0.3}
    whole = start.clone()
    wanted = train(whole, bench, how, "x", 0, snapshot=2)
    bench.checkpoints = tmp_path / "checkpoints"
    monkeypatch.setattr(checkpoint_module, "SECONDS", 0.0)
    plain = training_module._losses
    calls = iter(range(100))

    def deadly(*args: object) -> dict[str, torch.Tensor]:
        if next(calls) == at:
            raise Killed
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training_module, "_losses", deadly)
    with pytest.raises(Killed):
        train(start.clone(), bench, how, "x", 0, snapshot=2)
    steps: list[int] = []
    monkeypatch.setattr(training_module, "_losses", lambda *args: steps.append(1) or plain(*args))  # type: ignore[func-returns-value]
    again = start.clone()
    found = train(again, bench, how, "x", 0, snapshot=2)
    assert len(steps) == 24 - at, "what was done is not done again"
    for one, other in ((state(whole), state(again)), (wanted, found)):
        assert one is not None and other is not None and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    train(start.clone(), bench, how, "x", 0, snapshot=2)
    assert len(steps) == 24 - at, "a training that is over is not repeated"
    train(start.clone(), bench, how.model_copy(update={"learning_rate": 1e-3}), "x", 0)
    train(disturbed(start, 0.01), bench, how, "x", 0, snapshot=2)
    assert len(steps) == 72 - at, "other settings or weights are another training"


def test_a_damaged_checkpoint_is_refused(trained: MultiTaskModel, bench: Bench, tmp_path: Path) -> None:
    bench.checkpoints = tmp_path / "checkpoints"
    train(trained.clone(), bench, Training(steps=1), "x", 0)
    [file] = bench.checkpoints.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CompressError, match=r"training-.*safetensors' is damaged .* Remove it, or use --no-resume"):
        train(trained.clone(), bench, Training(steps=1), "x", 0)


def test_uncertainty_learns_to_trust_the_smaller_loss_more() -> None:
    weighting = Weighting("uncertainty", ["a", "b", "absent"], {}, 10)
    optimiser = torch.optim.SGD(weighting.parameters, lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        weighting.total({"a": torch.tensor(0.5), "b": torch.tensor(4.0)}).backward()
        optimiser.step()
    log_variance = weighting.state()["log_variance"]
    assert log_variance[:2].exp().tolist() == pytest.approx([0.5, 4.0], rel=1e-2), "its minimum is at the loss itself"
    assert float(log_variance[2]) == 0


def test_progress_weighs_the_task_that_falls_least() -> None:
    weighting = Weighting("progress", ["fast", "slow", "absent"], {"slow": 3.0}, 5)
    for step in range(10):
        assert weighting.state()["factors"].tolist() == [1, 1, 1], "two windows say what changed"
        weighting.total({"fast": torch.tensor(2.0 - (step > 4)), "slow": torch.tensor(2.0)})
        weighting.turn(step)
    fast, slow, absent = weighting.state()["factors"].tolist()
    assert fast + slow + absent == pytest.approx(3.0) and fast < slow == absent
    total = weighting.total({"fast": torch.tensor(1.0), "slow": torch.tensor(1.0)})
    assert float(total) == pytest.approx(fast + 3 * slow)


@pytest.mark.parametrize("rule", ["uncertainty", "progress"])
def test_weighed_losses_train(trained: MultiTaskModel, bench: Bench, rule: Rule) -> None:
    student = disturbed(trained)
    before = gap_to(trained, student)
    train(student, bench, Training(steps=60, learning_rate=2e-3, weighting=rule, distill="only"), "x", 0)
    after = gap_to(trained, student)
    assert all(after[name] < before[name] for name in before), (before, after)


# --- averages, checks, weights that follow the margins


def test_the_average_of_weights_has_no_bias_towards_the_start() -> None:
    module, decay = nn.Linear(2, 1, bias=False), 0.8
    average, seen = Average(module, decay), []
    for step in range(4):
        module.weight.data = torch.randn(1, 2, generator=torch.Generator().manual_seed(step))
        average.add(step)
        seen.append(module.weight.detach().clone())
    average.write(module)
    share = [(1 - decay) * decay ** (3 - step) / (1 - decay**4) for step in range(4)]
    assert sum(share) == pytest.approx(1)
    assert torch.allclose(module.weight, sum(s * w for s, w in zip(share, seen, strict=True)))


def test_average_weights_keep_masks_and_get_batch_norm_of_their_own(trained: MultiTaskModel, bench: Bench) -> None:
    model = disturbed(trained)
    mask = torch.rand(model.module.down[0].weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    model.masks = {"down.0.weight": mask}
    model.module.down[0].weight.data.mul_(mask)
    plain = model.clone()
    train(plain, bench, Training(steps=8, learning_rate=1e-2), "x", 0)
    train(model, bench, Training(steps=8, learning_rate=1e-2, ema=0.9), "x", 0)
    assert bool((model.module.down[0].weight[~mask] == 0).all())
    assert not torch.equal(model.module.down[0].weight, plain.module.down[0].weight)
    again = model.clone()
    reestimate_batchnorm(again.module, list(islice(bench.workload.batches("train", bench.seed), 20)))
    assert torch.allclose(again.module.down[1].running_mean, model.module.down[1].running_mean, atol=1e-5)
    assert not model.module.training


class Scripted:
    """Scores that leave the task `size` with given shares of its budget, and what they were asked about."""

    def __init__(self, bench: Bench, shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        left = iter(shares)
        allowed, before = bench.budgets["size"].allowed(bench.before["size"]), bench.before["size"]

        def scores(model: MultiTaskModel) -> dict[str, float]:
            self.seen.append(state(model))
            return {**bench.before, "size": before + (1 - next(left)) * allowed}

        monkeypatch.setattr(bench, "scores", scores)


@pytest.mark.parametrize(
    ("settings", "shares", "best", "told"),
    [
        ({}, [0.1, 0.7, 0.3, 0.2], 1, "tune kept its weights of step 6 of 12, where the task nearest its end had 70%"),
        ({}, [-0.9, -0.7, -0.3, 0.2], 3, ""),
        ({"patience": 2}, [0.5, 0.2, 0.5], 0, "tune stopped after 9 of 12 steps; its weights are those of step 3"),
        ({"stop_at_margin": 0.4}, [0.1, 0.4], 1, "tune stopped after 6 of 12 steps; its weights are those of step 6"),
    ],
)
def test_a_watched_training_hands_back_its_best_state_and_stops_when_told(
    trained: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, float], shares: list[float], best: int, told: str,
) -> None:  # fmt: skip
    bench = tiny.bench(trained, tmp_path, size=0.1)
    script = Scripted(bench, shares, monkeypatch)
    bench.checkpoints = tmp_path / "checkpoints"
    how = Training.model_validate({"steps": 12, "check_every": 3, **settings})
    model = disturbed(trained)
    train(model, bench, how, "tune", 0)
    assert len(script.seen) == len(shares)
    assert all(torch.equal(value, script.seen[best][name]) for name, value in state(model).items())
    assert " ".join(bench.notes).startswith(told) and bool(told) == bool(bench.notes)
    monkeypatch.setattr(training_module, "_losses", lambda *_: pytest.fail("it was over"))
    notes, bench.notes = bench.notes, []
    again = disturbed(trained)
    train(again, bench, how, "tune", 0)
    assert all(torch.equal(value, script.seen[best][name]) for name, value in state(again).items())
    assert bench.notes == notes[:1]


def test_checks_do_not_change_what_is_learnt(trained: MultiTaskModel, tmp_path: Path) -> None:
    bench, found = tiny.bench(trained, tmp_path, size=0.1), []
    bench.checkpoints = tmp_path
    for every in (0, 1):
        train(disturbed(trained), bench, Training(steps=5, check_every=every), "x", 0)
    for file in tmp_path.glob("training-*"):
        kept = load_file(file)
        found.append({name: value for name, value in kept.items() if name.startswith("weight.")})
    one, other = found
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", [{"patience": 2}, {"stop_at_margin": 0.5}, {"weighting": "margins"}])
def test_what_goes_by_checks_needs_them(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="goes by checks; give 'check_every'"):
        Training.model_validate({"steps": 1, **settings})


def test_checks_need_budgets(trained: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match=r"check_every goes by what is left of budgets.* give \[budgets\]"):
        train(trained.clone(), bench, Training(steps=1, check_every=1), "x", 0)


def test_the_task_that_has_least_of_its_budget_left_weighs_most() -> None:
    weighting = Weighting("margins", ["safe", "tight", "over", "free"], {}, 10)
    weighting.follow({"safe": 0.9, "tight": 0.1, "over": -50.0})
    safe, tight, over, free = weighting.state()["factors"].tolist()
    assert over > tight > safe > free > 0, "a task without a budget has lost nothing"
    assert over / free == pytest.approx(math.e**3, rel=1e-5) and safe + tight + over + free == pytest.approx(4)
    assert float(weighting.total({"tight": torch.tensor(2.0)})) == pytest.approx(2 * tight)
    plain = Weighting("fixed", ["safe"], {}, 10)
    plain.follow({"safe": 0.9})
    assert plain.state()["factors"].tolist() == [1]


def test_checkpoints_are_written_every_so_many_steps(
    trained: MultiTaskModel, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.checkpoints, written = tmp_path / "checkpoints", []
    monkeypatch.setattr(
        checkpoint_module, "save_file", lambda tensors, path: written.append(int(tensors["step"])) or path.touch()
    )
    train(trained.clone(), bench, Training(steps=10, checkpoint_every=4), "x", 0)
    assert written == [4, 8, 10]


# --- threads, processes, devices


@pytest.mark.parametrize("asked", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_neither_threads_nor_cores_around_it_change_a_bit(tmp_path: Path, asked: int) -> None:
    """Pruning by gradients, recovering and fine-tuning on the threads that the recipe asks for."""
    short = (f"compute_threads={asked}", "stages.0.rounds=1", "stages.0.recover.steps=2", "stages.2.steps=4")
    loaded, base = recipe.load(tiny.recipe(tmp_path), short)
    loaded = loaded.model_copy(update={"stages": (loaded.stages[0], loaded.stages[2])})
    threads, cores, found = torch.get_num_threads(), os.sched_getaffinity(0), []
    try:
        for number, here in ((1, cores), (2, {min(cores)})):
            torch.set_num_threads(number)
            os.sched_setaffinity(0, here)
            job = pipeline.prepare(loaded, base, tiny.Silent(), builds=False)
            model, scores = pipeline.compress(job, tmp_path / str(number))
            found.append((state(model), scores))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
    (one, one_scores), (other, other_scores) = found
    assert one_scores == other_scores and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Pairs(tiny.Tiny):
    """Batches of two batches each."""

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        single = super().batches(split, seed)
        for one, other in zip(single, single, strict=True):
            labels = {name: torch.cat([label, other.labels[name]]) for name, label in one.labels.items()}
            yield Batch((torch.cat([one.inputs[0], other.inputs[0]]),), labels)


def test_two_processes_hold_the_same_and_learn_as_one_does_from_larger_batches(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = {"PYTHONPATH": f"{folder.parent}:{folder}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, str(folder / "two_processes.py"), str(tiny.recipe(tmp_path)), str(tmp_path)],
        env={**os.environ, **places}, check=True, timeout=120,
    )  # fmt: skip
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    assert json.loads((tmp_path / "1.json").read_text())["refused"].startswith("The processes do not agree about their")
    stages = {name.removeprefix("stages."): value for name, value in first.items() if name.startswith("stages.")}
    assert all(torch.equal(value, first[f"again.{name}"]) for name, value in stages.items())

    large = Pairs(batch_size=16, split_labels=False)
    plain = tiny.without_norms(large)
    start = state(plain)
    train(plain, tiny.bench(plain, tmp_path, large), Training(steps=4, distill="never"), "plain", 0)
    for name, value in state(plain).items():
        step, other = value - start[name], first[f"plain.{name}"] - start[name]
        assert float((step - other).norm()) < 0.02 * float(step.norm()), name


def test_only_a_run_is_shared_by_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CompressError, match="2 processes cannot sweep together; `compress run` alone can"):
        sweep.sweep(tmp_path, (), tmp_path / "out", 1, 1, tiny.Silent())
    assert not (tmp_path / "out").exists()


def test_a_report_says_what_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [compute.place(compute.CPU, number) for number in (1, 2)] == ["CPU, 1 thread", "CPU, 2 threads"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert compute.place(compute.CPU, 1) == "CPU, 1 thread, 3 processes"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Model H")
    assert compute.place(torch.device("cuda", 1), 1) == "Model H, 3 processes"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute.join("auto") == compute.join("cpu") == torch.device("cpu")
    with pytest.raises(CompressError, match="train_on = 'cuda', but torch sees no CUDA device here"):
        compute.join("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_learns_the_same_and_leaves_everything_on_the_cpu(
    trained: MultiTaskModel, tmp_path: Path, precision: str
) -> None:
    found = []
    for where in ("cpu", "cuda"):
        bench = tiny.bench(trained, tmp_path, size=1.0)
        bench.device, bench.checkpoints = torch.device(where), tmp_path / where
        model = disturbed(trained)
        settings = {"steps": 20, "precision": precision, "ema": 0.9, "check_every": 5, "distill": "always"}
        train(model, bench, Training.model_validate(settings), "x", 0)
        assert {tensor.device.type for tensor in state(model).values()} == {"cpu"}
        assert {tensor.device.type for tensor in state(bench.original).values()} == {"cpu"}
        found.append(gap_to(trained, model))
        assert bench.scores(trained) == pytest.approx(bench.before, abs=0.02)
    assert found[0] == pytest.approx(found[1], rel=0.3)


class Bypass(nn.Module):
    """A strided convolution of single pixels, of so many channels, beside a wider one."""

    layouts: dict[bool, list[bool]]

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.bypass = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 24, 1, 2)
        self.main = nn.Conv2d(channels, 24, 3, 2, 1)
        self.layouts = {True: [], False: []}  # whether channels came last, in training or not

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        self.layouts[self.training].append(x.is_contiguous(memory_format=torch.channels_last))
        return (self.main(x) + self.bypass(x)).mean((2, 3))


@pytest.mark.parametrize(("channels", "last"), [(4, False), (15, False), (16, True)])
def test_channels_are_last_but_where_a_gradient_would_be_written_past_its_end(
    channels: int, last: bool, tmp_path: Path
) -> None:
    example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    original, bench = plain.setup(partial(Bypass, channels), (example,), tmp_path)
    original.module.layouts[False].clear()
    model = original.clone()
    train(model, bench, Training(steps=3, distill="always"), "t", 0)
    assert model.module.layouts[True] == original.module.layouts[False] == [last] * 3
    assert all(value.is_contiguous() for value in original.module.parameters())
