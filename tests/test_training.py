"""The training loop and batch-norm statistics: what is learnt from, what is held, what repeats."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import compressor.checkpoint as checkpoint_module
import compressor.training as training_module
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


def test_one_and_two_threads_agree_closely(trained: MultiTaskModel, bench: Bench) -> None:
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = disturbed(trained)
            train(model, bench, Training(steps=6), "x", 0)
            found.append(gap_to(trained, model))
    finally:
        torch.set_num_threads(before)
    assert found[0] == pytest.approx(found[1], rel=0.02)


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
    model.module.stem[0].register_forward_hook(lambda _, __, out: seen.append(out.detach().mean((0, 2, 3))))
    train(model, bench, Training(steps=30, learning_rate=1e-12), "settle", 0)
    assert len(seen) == 30
    assert torch.allclose(model.module.stem[1].running_mean, torch.stack(seen[-20:]).mean(0), atol=1e-5)
    assert model.module.stem[1].momentum == trained.module.stem[1].momentum


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


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "progress"])
@pytest.mark.parametrize("at", [0, 3, 13])
def test_a_training_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    trained: MultiTaskModel, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, weighting: Rule
) -> None:
    """With dropout, so that the random generator matters, masks held, and a snapshot taken on the way."""
    how = Training(steps=24, learning_rate=5e-3, weight_decay=0.1, weighting=weighting)
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
    for step in range(400):
        optimiser.zero_grad()
        weighting.total({"a": torch.tensor(0.5), "b": torch.tensor(4.0)}, step).backward()
        optimiser.step()
    log_variance = weighting.state()["log_variance"]
    assert log_variance[:2].exp().tolist() == pytest.approx([0.5, 4.0], rel=1e-2), "its minimum is at the loss itself"
    assert float(log_variance[2]) == 0


def test_progress_weighs_the_task_that_falls_least() -> None:
    weighting = Weighting("progress", ["fast", "slow", "absent"], {"slow": 3.0}, 5)
    for step in range(10):
        assert weighting.state()["factors"].tolist() == [1, 1, 1], "two windows say what changed"
        weighting.total({"fast": torch.tensor(2.0 - (step > 4)), "slow": torch.tensor(2.0)}, step)
    fast, slow, absent = weighting.state()["factors"].tolist()
    assert fast + slow + absent == pytest.approx(3.0) and fast < slow == absent
    total = weighting.total({"fast": torch.tensor(1.0), "slow": torch.tensor(1.0)}, 10)
    assert float(total) == pytest.approx(fast + 3 * slow)


@pytest.mark.parametrize("rule", ["uncertainty", "progress"])
def test_weighed_losses_train(trained: MultiTaskModel, bench: Bench, rule: Rule) -> None:
    student = disturbed(trained)
    before = gap_to(trained, student)
    train(student, bench, Training(steps=60, learning_rate=2e-3, weighting=rule, distill="only"), "x", 0)
    after = gap_to(trained, student)
    assert all(after[name] < before[name] for name in before), (before, after)
