"""Stages: what they promise about budgets, widths, masks and exactness."""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

import compressor.stages.prune as prune_module
from compressor.allocation import cheapest
from compressor.bench import Bench, by_batch, reestimate_batchnorm, takes_batches
from compressor.channels import Axis, ChannelMap, Contraction
from compressor.combining import combine
from compressor.costs import Ledger
from compressor.errors import CompressError
from compressor.groups import Group, Prunable
from compressor.model import MultiTaskModel
from compressor.record import sizes_of
from compressor.sequential import Oracle, judging
from compressor.speed import Speed, replayed
from compressor.stages.finetune import Finetune
from compressor.stages.pathway import Pathway
from compressor.stages.prune import Prune
from compressor.training import Training
from compressor.workload import Batch, Split, Task


def prune(**settings: object) -> Prune:
    return Prune(kind="prune", **({"batches": 2, "round_to": 4} | settings))  # type: ignore[arg-type]


def widths(model: MultiTaskModel) -> dict[str, int]:
    layers = (nn.Conv2d, nn.Linear)
    return {name: len(layer.weight) for name, layer in model.module.named_modules() if isinstance(layer, layers)}


# --- prune


@pytest.mark.parametrize("goal", [{"macs": 0.5}, {"parameters": 0.4}, {"macs": 0.6, "parameters": 0.5}])
def test_prune_meets_its_goal_in_whole_vectors(model: MultiTaskModel, bench: Bench, goal: dict[str, float]) -> None:
    before = sizes_of(model)
    after = prune(rounds=2, **goal).run(model, bench)
    macs, parameters, _ = sizes_of(after)
    assert macs <= goal.get("macs", 1) * before[0]
    assert parameters <= goal.get("parameters", 1) * before[1]
    assert all(width % 4 == 0 for name, width in widths(after).items() if name not in ("fused", "mask.2"))
    assert sizes_of(model) == before, "the model that was given is left alone"
    assert bench.notes == []


def test_prune_uses_the_devices_vector_width_unless_told(model: MultiTaskModel, bench: Bench) -> None:
    bench.multiple = 8
    after = prune(macs=0.6, rounds=1, round_to=0).run(model, bench)
    assert {width % 8 for name, width in widths(after).items() if name not in ("fused", "mask.2")} == {0}


def test_prune_stops_at_a_budget_and_names_the_task(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, size=0.01, kind=1.0)
    after = prune(macs=0.2, rounds=3).run(model, bench)
    assert bench.margins(bench.scores(after))["size"] >= 0
    assert len(bench.notes) == 1 and bench.short
    said = r"prune stopped short of its goal, at MACs .*: with .* task 'size' would leave its budget by .* from '.+'\."
    assert re.fullmatch(said, bench.notes[0])
    assert bench.notes[0].split("'")[-2] in {group.name for group in Prunable.of(model).groups}


def test_prune_goes_as_far_as_a_budget_lets_it(model: MultiTaskModel, tmp_path: Path) -> None:
    """One round would fail; half of it, or a quarter, does not."""
    sizes = []
    for retries in (0, 3):
        bench = tiny.bench(model, tmp_path, size=0.05, kind=1.0)
        after = prune(macs=0.2, rounds=1, retries=retries).run(model, bench)
        assert min(bench.margins(bench.scores(after)).values()) >= 0 and bench.short
        sizes.append(sizes_of(after)[0])
    assert sizes[0] == sizes_of(model)[0] > sizes[1]


def test_uniform_keeps_the_same_share_of_every_group_and_meets_the_goal(model: MultiTaskModel, bench: Bench) -> None:
    after = prune(macs=0.5, rounds=1, search="uniform", criterion="magnitude").run(model, bench)
    assert sizes_of(after)[0] <= 0.5 * sizes_of(model)[0]
    before, now = widths(model), widths(after)
    shares = {name: now[name] / before[name] for name in before if name not in ("fused", "mask.2")}
    assert max(shares.values()) - min(shares.values()) <= 4 / 16
    wider = prune(macs=0.5, rounds=1, search="uniform", criterion="magnitude", round_to=1).run(model, bench)
    assert 0.42 * sizes_of(model)[0] < sizes_of(wider)[0] <= 0.5 * sizes_of(model)[0]


def test_sequential_asks_the_cut_network_a_few_times_a_group(
    model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    plain = Oracle.holds

    def holds(self: Oracle, group: Group, keep: Tensor, share: float) -> bool:
        asked.append(share)
        return plain(self, group, keep, share)

    monkeypatch.setattr(Oracle, "holds", holds)
    bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size=0.1, kind=0.2, mask=0.2)
    after = prune(macs=0.7, rounds=1, search="sequential", round_to=1).run(model, bench)
    assert sizes_of(after)[0] < sizes_of(model)[0]
    assert min(bench.margins(bench.scores(after)).values()) >= 0
    groups = Prunable.of(model).groups
    assert 0 < len(asked) <= 5 * len(groups)
    assert asked == sorted(asked) and asked[-1] <= 1


def test_sequential_says_which_task_held_which_group(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size=0.03, kind=1.0, mask=1.0)
    after = prune(macs=0.1, rounds=1, search="sequential").run(model, bench)
    assert bench.short and sizes_of(after)[0] > 0.1 * sizes_of(model)[0]
    assert re.search(r"no budget allows more of ('.+' \(task '.+'\)(, )?)+\.$", bench.notes[-1])
    assert "(task 'size')" in bench.notes[-1]


def test_what_was_recovered_is_spent_on_another_walk(model: MultiTaskModel, tmp_path: Path) -> None:
    work = tiny.Tiny(split_labels=False)
    sizes = []
    for retries in (0, 3):
        bench = tiny.bench(model, tmp_path, work, size=0.05, kind=0.1, mask=0.1)
        how = Training(steps=12, learning_rate=1e-3)
        stage = prune(macs=0.05, rounds=1, retries=retries, search="sequential", recover=how, round_to=1)
        after = stage.run(model, bench)
        assert bench.short and min(bench.margins(bench.scores(after)).values()) >= 0
        sizes.append(sizes_of(after)[0])
    assert sizes[1] < sizes[0] < sizes_of(model)[0]


def test_the_oracle_sees_what_the_cut_network_answers(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, size=1.0)
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    for group in prunable.groups:
        keep[group.classes[::3]] = False
    oracle = Oracle(model, prunable, bench, 2, 1.0)
    seen = oracle.scores(keep)
    cut = prunable.cut(model, keep)
    with by_batch(cut.module):
        assert seen == pytest.approx(bench.scores(cut, judging(bench)), rel=1e-4)
    assert oracle.scores(prunable.keep_all()) != seen and oracle.asked == 2


@pytest.mark.parametrize(("after", "holds"), [
    ({"size": 2.9}, True), ({"size": 3.1}, False),
    ({"kind": 0.34}, True), ({"kind": 0.32}, False), ({"kind": 0.0}, False),
])  # fmt: skip
def test_slack_lets_a_score_fall_as_its_inverse_may_rise(
    model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: dict[str, float], holds: bool
) -> None:
    bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size="2 %", kind="2 %")
    before = {"size": 1.0, "kind": 1.0, "mask": 1.0}
    monkeypatch.setattr(Oracle, "_scored", lambda self, model: before)
    prunable = Prunable.of(model)
    oracle, group = Oracle(model, prunable, bench, 2, slack=100.0), prunable.groups[0]
    monkeypatch.setattr(Oracle, "_scored", lambda self, model: before | after)
    assert oracle.holds(group, prunable.keep_all(), 1.0) == holds
    assert oracle.stopped == ({} if holds else {group.name: next(iter(after))})


class Pooled(tiny.TinyNet):
    """With a batch norm that sees one value a channel of each picture."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 4))  # type: ignore[assignment]


class EndsInOne(tiny.Tiny):
    """The last batch of each split is a single picture."""

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        yield from super().batches(split, seed)
        yield next(tiny.Tiny(1, self.split_labels).batches(split, seed))


def test_the_oracle_estimates_batch_norm_anew_where_a_batch_is_too_small(tmp_path: Path) -> None:
    torch.manual_seed(0)
    work = EndsInOne(split_labels=False)
    model = MultiTaskModel(Pooled().eval(), work.tasks, work.example_inputs())
    whole = list(work.batches("calibrate", 0))
    assert takes_batches(model.clone().module, whole[:-1]) and not takes_batches(model.clone().module, whole)
    bench, prunable = tiny.bench(model, tmp_path, work, size=1.0), Prunable.of(model)
    keep = prunable.keep_all()
    keep[prunable.groups[0].classes[::3]] = False
    cut = prunable.cut(model, keep)
    reestimate_batchnorm(cut.module, bench.calibration(2))
    seen = Oracle(model, prunable, bench, 2, 1.0).scores(keep)
    assert seen == pytest.approx(bench.scores(cut, judging(bench)), rel=1e-4)


def test_a_search_that_hoped_too_much_is_allowed_less(model: MultiTaskModel, tmp_path: Path) -> None:
    """Recovery at a rate that spoils the network takes every round out of its budget."""
    bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size=0.05, kind=0.1, mask=0.1)
    how = Training(steps=8, learning_rate=0.3)
    prune(macs=0.3, rounds=1, search="sequential", recover=how, round_to=1).run(model, bench)
    assert len(bench.asked) == 3 and bench.short


def test_sequential_needs_budgets(model: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match=r"goes by budgets, and the recipe has none"):
        prune(macs=0.5, search="sequential").run(model, bench)


def test_slack_lets_prune_go_further(model: MultiTaskModel, tmp_path: Path) -> None:
    sizes = [
        sizes_of(prune(macs=0.2, rounds=4, slack=slack).run(model, tiny.bench(model, tmp_path, size=0.05)))[0]
        for slack in (1.0, 50.0)
    ]
    assert sizes[1] < sizes[0]


def test_prune_says_why_it_ends_short(model: MultiTaskModel, bench: Bench) -> None:
    full = widths(model)
    after = prune(macs=0.05, rounds=3, keep_at_least=0.75).run(model, bench)
    assert all(width >= 0.75 * full[name] for name, width in widths(after).items()), "of the width it came with"
    assert bench.notes == [
        "prune stopped short of its goal, at MACs 57%, parameters 57%: no group may become narrower "
        "(widths are multiples of 4, at least 75% of what they were)."
    ]


def test_prune_judges_with_fresh_batch_norm(
    model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    plain = Bench.scores

    def scores(self: Bench, judged: MultiTaskModel) -> dict[str, float]:
        seen.append(judged.module.down[1].running_var.clone())
        return plain(self, judged)

    monkeypatch.setattr(Bench, "scores", scores)
    monkeypatch.setattr(prune_module, "CRITERIA", {"taylor": _keep_stem_last})
    prune(macs=0.9, rounds=1).run(model, bench)
    kept = seen[0]
    assert len(kept) == 32
    assert not torch.allclose(kept, model.module.down[1].running_var, rtol=0.05)


def _keep_stem_last(model: MultiTaskModel, prunable: Prunable, bench: Bench, batches: int) -> Tensor:
    """Importance that has only the stem pruned, so that the next layer's statistics move."""
    score = torch.full((len(model.tasks), prunable.class_count), 1e6)
    score[:, next(group for group in prunable.groups if group.name == "stem.0").classes] = 1.0
    return score


def test_recovery_training_is_counted_and_done(model: MultiTaskModel, bench: Bench) -> None:
    stage = prune(macs=0.6, rounds=2, recover=Training(steps=3))
    assert stage.train_steps == 6, "unless a round has to be tried again"
    trained, plain = stage.run(model, bench), prune(macs=0.6, rounds=2).run(model, bench)
    assert not torch.equal(trained.module.fused.bias, plain.module.fused.bias)


class FixedView(nn.Module):
    """`x.view(-1, 128)` writes the width of `b` into the module's own code; `a` is free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 8, 3, 2, 1)
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return {"fused": self.head(x.view(-1, 128))}


class Viewed(tiny.Tiny):
    tasks = tiny.Tiny.tasks[:2]

    def build(self) -> nn.Module:
        return FixedView()

    def metrics(self) -> Mapping[str, object]:  # type: ignore[override]
        return {name: metric for name, metric in super().metrics().items() if name != "mask"}

    def batches(self, split: str, seed: int) -> Iterator[object]:  # type: ignore[override]
        for batch in super().batches(split, seed):  # type: ignore[arg-type]
            batch.labels.pop("mask", None)  # type: ignore[attr-defined]
            yield batch


def test_groups_the_module_cannot_shrink_are_left_whole_and_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    work = Viewed()
    model = MultiTaskModel(work.build().eval(), work.tasks, work.example_inputs())
    bench = tiny.bench(model, tmp_path, work)  # type: ignore[arg-type]
    after = prune(macs=0.2, rounds=1).run(model, bench)
    assert widths(after) == {"a": 4, "b": 8, "head": 4}
    assert bench.notes[0] == "left whole, because the module's own code fixes their size: b."


class Normed(Viewed):
    def build(self) -> nn.Module:
        module = super().build()
        module.a = nn.Sequential(module.a, nn.GroupNorm(1, 16))
        return module


@pytest.fixture
def normed(tmp_path: Path) -> tuple[MultiTaskModel, Bench]:
    torch.manual_seed(0)
    work = Normed()
    model = MultiTaskModel(work.build().eval(), work.tasks, work.example_inputs())
    return model, tiny.bench(model, tmp_path, work, kind=1.0, size=1.0)  # type: ignore[arg-type]


def test_layers_whose_channels_an_operator_mixes_are_named(normed: tuple[MultiTaskModel, Bench]) -> None:
    model, bench = normed
    prune(macs=0.8, rounds=1).run(model, bench)
    told = "because of what group_norm does with their channels ('shrink_norms' may let it go over fewer): a.0."
    assert bench.notes[0] == f"left whole, {told}" and bench.short


@pytest.mark.parametrize("search", ["value", "sequential"])
def test_norms_go_over_fewer_channels_where_asked(search: str, normed: tuple[MultiTaskModel, Bench]) -> None:
    model, bench = normed
    after = prune(macs=0.6, rounds=1, search=search, shrink_norms=True, slack=100.0).run(model, bench)
    assert widths(after)["a.0"] < 16 and not bench.short


def test_the_oracle_takes_norms_over_what_is_left(normed: tuple[MultiTaskModel, Bench]) -> None:
    model, bench = normed
    prunable = Prunable.of(model, shrinks=True)
    keep = prunable.keep_all()
    keep[next(group for group in prunable.groups if group.name == "a.0").classes[::4]] = False
    seen = Oracle(model, prunable, bench, 2, 1.0).scores(keep)
    assert seen == pytest.approx(bench.scores(prunable.cut(model, keep), judging(bench)), rel=1e-4)


def test_layers_are_not_fitted_to_norms_of_more_channels() -> None:
    with pytest.raises(ValueError, match="leave it or 'shrink_norms' out"):
        prune(macs=0.5, reconstruct=True, shrink_norms=True)


def test_max_protects_what_one_task_needs_and_sum_trades(bench: Bench) -> None:
    score_TC = torch.tensor([[9.0, 1.0, 0.0], [0.0, 5.0, 5.0]])
    assert combine(score_TC, ["kind", "size"], bench, "max").tolist() == pytest.approx([0.9, 0.5, 0.5])
    assert combine(score_TC, ["kind", "size"], bench, "sum").tolist() == pytest.approx([0.9, 0.6, 0.5])
    assert combine(7 * score_TC, ["kind", "size"], bench, "sum").tolist() == pytest.approx([0.9, 0.6, 0.5])


def test_unanimous_goes_by_each_tasks_own_order(bench: Bench) -> None:
    score_TC = torch.tensor([[9.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.1]])
    value = combine(score_TC, ["kind", "size"], bench, "unanimous")
    assert value.tolist() == [1.0, 0.5, 1.0, 0.5], "scores of a task say nothing but its order; equal ones rank equally"
    assert combine(torch.zeros(2, 3), ["kind", "size"], bench, "unanimous").tolist() == [0, 0, 0]


def test_a_tighter_budget_weighs_more(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, kind="1 %", size="10 %")
    value = combine(
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), ["kind", "size", "mask"], bench, "max"
    )
    assert value.tolist() == pytest.approx([1.0, 0.1**0.5, 0.1])
    bench.before = {**bench.before, "kind": 0.0}  # of which a share is nothing that could be lost
    value = combine(torch.eye(3), ["kind", "size", "mask"], bench, "max")
    assert value.tolist() == pytest.approx([1.0, 0.001**0.5, 0.01])


def test_a_weight_is_a_factor_beside_the_budgets(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, kind="1 %", size="1 %")
    value = combine(torch.eye(2), ["kind", "size"], bench, "max", {"size": 4.0})
    assert value.tolist() == pytest.approx([0.25, 1.0])
    stage = prune(macs=0.5, weights={"siez": 2.0})
    with pytest.raises(CompressError, match=r"weights: no task 'siez'\. Did you mean 'size'"):
        stage.run(model, bench)
    with pytest.raises(ValueError, match="greater than 0"):
        prune(macs=0.5, weights={"size": 0.0})
    with pytest.raises(ValueError, match="leave 'weights' out"):
        prune(macs=0.5, weights={"size": 2.0}, combine="unanimous")


def test_a_task_that_needs_nothing_is_no_division_by_zero(bench: Bench) -> None:
    assert combine(torch.zeros(2, 3), ["kind", "size"], bench, "max").tolist() == [0, 0, 0]


# --- what channels cost


def test_the_ledger_follows_the_models_cost(model: MultiTaskModel) -> None:
    prunable = Prunable.of(model)
    ledger, keep = Ledger(prunable), prunable.keep_all()
    assert ledger.now == prunable.cost(keep)
    chance = torch.Generator().manual_seed(0)
    for group in (*prunable.groups, *prunable.groups):
        left = group.classes[keep[group.classes]]
        gone = left[torch.randperm(len(left), generator=chance)[: len(left) // 2]].tolist()
        before, saved = ledger.now, ledger.saving(gone)
        assert ledger.now == before, "asking changes nothing"
        ledger.drop(gone)
        keep[gone] = False
        assert ledger.now == prunable.cost(keep) == (before[0] - saved[0], before[1] - saved[1])


def test_groups_that_do_not_touch_do_not_affect_each_other(model: MultiTaskModel) -> None:
    prunable = Prunable.of(model)
    ledger = Ledger(prunable)
    by_name = {group.name: group.classes.tolist() for group in prunable.groups}
    for one in by_name.values():
        for other in by_name.values():
            apart = not ledger.touching(one) & ledger.touching(other)
            saved, both = ledger.saving(one[:2])[0] + ledger.saving(other[:2])[0], ledger.saving([*one[:2], *other[:2]])
            assert not apart or both[0] == saved


def test_choosing_is_greedy_by_value_for_cost(model: MultiTaskModel) -> None:
    """No more is lost than by asking the whole network's cost about every group at every step."""
    prunable = Prunable.of(model)
    value = torch.rand(prunable.class_count, generator=torch.Generator().manual_seed(0))
    full = prunable.cost(prunable.keep_all())
    goal, floors = (full[0] // 2, full[1] // 2), dict.fromkeys((group.name for group in prunable.groups), 4)
    keep = prunable.keep_all()
    while any(now > wanted for now, wanted in zip(prunable.cost(keep), goal, strict=True)):
        now, offers = prunable.cost(keep), []
        for group in prunable.groups:
            left = sorted(group.classes[keep[group.classes]].tolist(), key=lambda k: value[k])
            if len(left) - 4 < 4:
                continue
            trial = keep.clone()
            trial[left[:4]] = False
            then = prunable.cost(trial)
            saved = sum((a - b) / f for a, b, f, w in zip(now, then, full, goal, strict=True) if a > w)
            worth = float(value[left[:4]].sum())
            offers.append((worth / saved, worth, then[0] <= goal[0] and then[1] <= goal[1], trial))
        best = min(offers, key=lambda offer: offer[0])
        enough = min((offer for offer in offers if offer[2]), key=lambda offer: offer[1], default=best)
        keep = (enough if enough[1] <= best[1] else best)[3]
    found = cheapest(prunable, list(prunable.groups), value, goal, 4, floors)
    assert all(now <= wanted for now, wanted in zip(prunable.cost(found), goal, strict=True))
    assert float(value[~found].sum()) <= float(value[~keep].sum())


@pytest.mark.parametrize(("fine", "gone"), [(0.2, [3, 4]), (0.3, [1])])
def test_a_coarse_slice_goes_only_where_finer_ones_would_lose_more(fine: float, gone: list[int]) -> None:
    ids = {"coarse": torch.arange(1, 3), "fine": torch.arange(3, 13)}
    axes = {name: Axis(f"{name}.weight", 0) for name in ids}
    cost = {"coarse": 1000, "fine": 100}
    prunable = Prunable(
        network=None,  # type: ignore[arg-type]  # nothing is cut
        channels=ChannelMap(
            axes={axes[name]: ids[name] for name in ids},
            contractions=[Contraction(name, f"{name}.weight", axes[name], None, cost[name]) for name in ids],
        ),
        groups=tuple(Group(name, ids[name]) for name in ids),
        sizes={f"{name}.weight": (len(ids[name]),) for name in ids},
        trained=frozenset(),
    )
    value = torch.tensor([0.0, 0.5, 0.6, *[fine + k / 1000 for k in range(10)]])
    keep = cheapest(prunable, list(prunable.groups), value, (3000 - 150, 0), 1, {"coarse": 1, "fine": 1})
    assert (~keep).nonzero().flatten().tolist() == gone


def test_choosing_among_a_hundred_groups_of_a_hundred_slices_takes_seconds() -> None:
    classes = [torch.arange(1 + 800 * g, 801 + 800 * g) for g in range(100)]
    axes = {Axis(f"l{g}.weight", 0): ids for g, ids in enumerate(classes)}
    axes |= {Axis(f"l{g + 1}.weight", 1): ids for g, ids in enumerate(classes[:-1])}
    contractions = [
        Contraction(f"l{g}", f"l{g}.weight", Axis(f"l{g}.weight", 0), Axis(f"l{g}.weight", 1) if g else None, 9)
        for g in range(100)
    ]
    prunable = Prunable(
        network=None,  # type: ignore[arg-type]  # nothing is cut
        channels=ChannelMap(axes=axes, contractions=contractions),
        groups=tuple(Group(f"l{g}", ids) for g, ids in enumerate(classes)),
        sizes={f"l{g}.weight": (800, 800 if g else 3) for g in range(100)},
        trained=frozenset(f"l{g}.weight" for g in range(100)),
    )
    value = torch.rand(80001, generator=torch.Generator().manual_seed(0))
    full = prunable.cost(prunable.keep_all())
    begun = time.process_time()
    keep = cheapest(prunable, list(prunable.groups), value, (full[0] // 100, 0), 8, {f"l{g}": 8 for g in range(100)})
    assert time.process_time() - begun < 20
    assert int(keep.sum()) == 1 + 100 * 8, "the second goal cannot be met: everything is as narrow as it may be"


# --- finetune and pathway


def test_finetune_leaves_what_it_was_given_alone(model: MultiTaskModel, bench: Bench) -> None:
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    after = Finetune(kind="finetune", steps=2).run(model, bench)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert not torch.equal(after.module.fused.weight, model.module.fused.weight)


def test_pathway_removes_unread_channels_without_changing_an_answer(model: MultiTaskModel, bench: Bench) -> None:
    with torch.no_grad():
        model.module.down[0].weight[:, ::2] = 0
        model.module.outer[0].weight[:, 5:9] = 0
    after = Pathway(kind="pathway").run(model, bench)
    assert widths(after)["stem.0"] == 8 and widths(after)["inner.0"] == 28
    assert after.kept["stem.0.weight"][0] == list(range(1, 16, 2))
    batch = bench.validation[0]
    with torch.no_grad():
        before, now = model.answers(*batch.inputs), after.answers(*batch.inputs)
    for name in before:
        assert torch.allclose(before[name], now[name], rtol=1e-4, atol=1e-5 * float(before[name].abs().max()))


def test_pathway_without_anything_unread_changes_nothing(model: MultiTaskModel, bench: Bench) -> None:
    after = Pathway(kind="pathway").run(model, bench)
    assert after.kept == {} and widths(after) == widths(model)


def test_pathway_refuses_a_size_the_module_fixes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MultiTaskModel(FixedView().eval(), (Task("kind", output="fused"),), (torch.rand(1, 1, 16, 16),))
    with torch.no_grad():
        model.module.head.weight[:, :32] = 0  # the first two channels of b
    bench = Bench(tiny.Tiny(), model, {}, 4, 0, tiny.Silent(), directory=tmp_path)
    with pytest.raises(CompressError, match=r"code fixes a size that the cut changes: .*\. Leave the pathway"):
        Pathway(kind="pathway").run(model, bench)


# --- a goal in latency


def as_slow_as_its_macs(full: int, power: float) -> object:
    """A device whose latency is a share of multiply-adds to some power, and 10 % that nothing saves."""
    return lambda model: 0.1 + 0.9 * (sizes_of(model)[0] / full) ** power


@pytest.mark.parametrize("power", [0.6, 1.0])
@pytest.mark.parametrize("goal", [0.75, 0.5])
def test_prune_meets_a_goal_in_latency(model: MultiTaskModel, bench: Bench, goal: float, power: float) -> None:
    bench.speed = as_slow_as_its_macs(sizes_of(model)[0], power)  # type: ignore[assignment]
    after = prune(latency=goal, rounds=2, round_to=1).run(model, bench)
    assert 0.9 * goal <= bench.speed(after) <= 1.05 * goal  # type: ignore[misc]
    assert not bench.short


def test_a_latency_goal_that_nothing_reaches_is_said(model: MultiTaskModel, bench: Bench) -> None:
    bench.speed = lambda _: 0.9
    prune(latency=0.5, rounds=1).run(model, bench)
    assert bench.short and bench.notes[-1].startswith("prune ended at 90.0% of the original's latency instead of 50.0%")


@pytest.mark.parametrize(
    ("reached", "notes"),
    [
        (0.52, []),
        (0.6, ["prune ended at 60.0% of the original's latency instead of 50.0%: task 'kind' would leave its budget."]),
    ],
    ids=["within 5 %", "beyond"],
)
def test_a_correction_that_fails_is_told_where_it_was_needed(
    reached: float, notes: list[str], model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.speed = lambda one: 1.0 if one is model else reached
    stage, rounds = prune(latency=0.5, rounds=1), Prune._rounds
    whys = iter(["", "task 'kind' would leave its budget"])
    monkeypatch.setattr(Prune, "_rounds", lambda *given: (rounds(*given)[0], next(whys)))
    stage.run(model, bench)
    assert bench.short == bool(notes) and bench.notes == notes


@pytest.mark.parametrize(("reached", "corrections"), [(0.505, 0), (0.515, 2)])
def test_only_what_is_measurably_slower_than_the_goal_is_corrected(
    reached: float, corrections: int, model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.speed = lambda one: 1.0 if one is model else reached
    rounds, asked = Prune._rounds, list[object]()
    monkeypatch.setattr(Prune, "_rounds", lambda *given: asked.append(given[3]) or rounds(*given))
    prune(latency=0.5, rounds=1).run(model, bench)
    assert len(asked) == 1 + corrections and not bench.short


def test_a_network_that_is_fast_enough_is_left_as_it_is(model: MultiTaskModel, bench: Bench) -> None:
    bench.speed = lambda _: 0.4
    assert prune(latency=0.5, rounds=1).run(model, bench) is model
    assert bench.notes == ["nothing was pruned: the latency is within 50.0% of the original's as it is."]


def test_a_latency_goal_needs_a_device(model: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match="no device to measure it on"):
        prune(latency=0.5).run(model, bench)


@pytest.mark.parametrize(("vector", "best"), [(4, 4), (16, 16)])
def test_widths_are_rounded_to_the_finest_multiple_that_is_as_fast(
    model: MultiTaskModel, bench: Bench, vector: int, best: int
) -> None:
    def padded(tried: MultiTaskModel) -> float:  # a device that computes whole vectors
        wasted = sum(-width % vector for width in widths(tried).values())
        return sizes_of(tried)[0] / sizes_of(model)[0] * (1 + 0.1 * wasted)

    bench.multiple, bench.speed = 16, padded
    after = prune(macs=0.6, rounds=1, round_to="measured").run(model, bench)
    assert all(width % best == 0 or width in (4, 2, 1) for width in widths(after).values())
    assert bench.notes[0].startswith(f"widths are multiples of {best}; time a multiply-add over the original's, by ")


def test_rounding_by_measurement_needs_a_device(model: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match="needs a device to measure on"):
        prune(macs=0.6, round_to="measured").run(model, bench)


def test_a_killed_stage_is_told_what_it_was_told_before(model: MultiTaskModel, tmp_path: Path) -> None:
    times = iter([0.9, 0.7, 0.5, 0.3])
    first = replayed(lambda _: next(times), tmp_path / "partial")
    assert [first(model), first(model)] == [0.9, 0.7]
    again = replayed(lambda _: next(times), tmp_path / "partial")
    assert [again(model), again(model), again(model)] == [0.9, 0.7, 0.5]
    assert replayed(lambda _: next(times), tmp_path / "other")(model) == 0.3


def test_speed_is_a_share_of_the_originals(model: MultiTaskModel) -> None:
    from networks import cpu_device, host_bits

    from targets.cpu import CpuTarget

    speed = Speed(model, CpuTarget(), cpu_device(bits=host_bits()), 1, 0)
    assert 0.5 < speed(model) < 2.0, "the same network, on a machine that others use"
