"""Stages: what they promise about budgets, widths, masks and exactness."""

import re
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compressor.stages.prune as prune_module
from compressor.allocation import cheapest
from compressor.bench import Bench, reestimate_batchnorm
from compressor.channels import Axis, ChannelMap, Contraction
from compressor.costs import Ledger
from compressor.errors import CompressError
from compressor.groups import Group, Prunable
from compressor.masks import Pattern, Scope, keep_most, keep_n_of_m, unanimous
from compressor.model import MultiTaskModel, get_tensor
from compressor.record import sizes_of
from compressor.sequential import Oracle, judging
from compressor.stages.finetune import Finetune
from compressor.stages.pathway import Pathway
from compressor.stages.prune import LEAST_PRESSURE, Prune, combine, spent
from compressor.stages.ticket import Ticket, alive, by_tasks, magnitude, prunable_weights, rewind
from compressor.training import Training
from compressor.workload import Task


@pytest.fixture
def model() -> MultiTaskModel:
    return tiny.model()


@pytest.fixture
def bench(model: MultiTaskModel, tmp_path: Path) -> Bench:
    return tiny.bench(model, tmp_path)


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
    bench = tiny.bench(model, tmp_path, tiny.Tiny(split_labels=False), size=0.01, kind=1.0, mask=1.0)
    after = prune(macs=0.1, rounds=1, search="sequential").run(model, bench)
    assert bench.short and sizes_of(after)[0] > 0.1 * sizes_of(model)[0]
    assert re.search(r"no budget allows more of ('.+' \(task '.+'\)(, )?)+\.$", bench.notes[-1])
    assert "(task 'size')" in bench.notes[-1]


def test_what_was_recovered_is_spent_on_another_walk(model: MultiTaskModel, tmp_path: Path) -> None:
    work = tiny.Tiny(split_labels=False)
    sizes = []
    for retries in (0, 3):
        bench = tiny.bench(model, tmp_path, work, size=0.02, kind=0.1, mask=0.1)
        how = Training(steps=12, learning_rate=2e-3)
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
    reestimate_batchnorm(cut.module, bench.calibration(2))
    assert seen == pytest.approx(bench.scores(cut, judging(bench)), rel=1e-4)
    assert oracle.scores(prunable.keep_all()) != seen and oracle.asked == 2


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
        "prune ended short of its goal, at MACs 57%, parameters 57%: no group may become narrower "
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
        module.b = nn.Sequential(module.b, nn.GroupNorm(1, 8))
        return module


def test_layers_whose_channels_an_operator_mixes_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    work = Normed()
    model = MultiTaskModel(work.build().eval(), work.tasks, work.example_inputs())
    bench = tiny.bench(model, tmp_path, work)  # type: ignore[arg-type]
    prune(macs=0.8, rounds=1).run(model, bench)
    assert bench.notes == ["left whole, because of what group_norm does with their channels: b.0."]


def test_max_protects_what_one_task_needs_and_sum_trades(bench: Bench) -> None:
    score_TC = torch.tensor([[9.0, 1.0, 0.0], [0.0, 5.0, 5.0]])
    assert combine(score_TC, ["kind", "size"], bench, "max", {}).tolist() == pytest.approx([0.9, 0.5, 0.5])
    assert combine(score_TC, ["kind", "size"], bench, "sum", {}).tolist() == pytest.approx([0.9, 0.6, 0.5])
    assert combine(7 * score_TC, ["kind", "size"], bench, "sum", {}).tolist() == pytest.approx([0.9, 0.6, 0.5])


def test_unanimous_goes_by_each_tasks_own_order(bench: Bench) -> None:
    score_TC = torch.tensor([[9.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.1]])
    value = combine(score_TC, ["kind", "size"], bench, "unanimous", {})
    assert value.tolist() == [1.0, 0.5, 1.0, 0.5], "scores of a task say nothing but its order; equal ones rank equally"
    assert combine(torch.zeros(2, 3), ["kind", "size"], bench, "unanimous", {}).tolist() == [0, 0, 0]


def test_a_tighter_budget_weighs_more(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, kind="1 %", size="10 %")
    value = combine(
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), ["kind", "size", "mask"], bench, "max", {}
    )
    assert value.tolist() == pytest.approx([1.0, 0.1, 0.01])
    bench.before = {**bench.before, "kind": 0.0}  # nothing is relative to zero: as if it had no budget
    value = combine(torch.eye(3), ["kind", "size", "mask"], bench, "max", {})
    assert value.tolist() == pytest.approx([0.1, 1.0, 0.1])


def test_a_task_weighs_as_much_of_its_budget_as_it_has_used(bench: Bench) -> None:
    used = {"kind": 2.0, "size": 0.5}
    assert combine(torch.eye(2), ["kind", "size"], bench, "max", used).tolist() == pytest.approx([1.0, 0.25])


def test_what_was_spent_is_told_in_budgets_and_only_when_all_tasks_have_one(
    model: MultiTaskModel, tmp_path: Path
) -> None:
    names = [task.name for task in model.tasks]
    bench = tiny.bench(model, tmp_path, **dict.fromkeys(names, "10 %"))
    assert set(spent(bench, bench.before).values()) == {LEAST_PRESSURE}
    first = next(task for task in model.tasks if task.name == names[0])
    worse = 0.8 if first.higher_is_better else 1.2
    after = {**bench.before, names[0]: worse * bench.before[names[0]]}
    assert spent(bench, after)[names[0]] == pytest.approx(2.0)
    assert spent(tiny.bench(model, tmp_path, **{names[0]: "10 %"}), after) == {}


def test_a_task_that_needs_nothing_is_no_division_by_zero(bench: Bench) -> None:
    assert combine(torch.zeros(2, 3), ["kind", "size"], bench, "max", {}).tolist() == [0, 0, 0]


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
    """The same answer as asking the whole network's cost about every group at every step."""
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
    assert torch.equal(cheapest(prunable, list(prunable.groups), value, goal, 4, floors), keep)


def test_choosing_among_a_hundred_groups_of_a_hundred_slices_takes_seconds() -> None:
    classes = [torch.arange(1 + 800 * g, 801 + 800 * g) for g in range(100)]
    axes = {Axis(f"l{g}.weight", 0): ids for g, ids in enumerate(classes)}
    axes |= {Axis(f"l{g + 1}.weight", 1): ids for g, ids in enumerate(classes[:-1])}
    contractions = [
        Contraction(f"l{g}", f"l{g}.weight", Axis(f"l{g}.weight", 0), Axis(f"l{g}.weight", 1) if g else None, 9)
        for g in range(100)
    ]
    prunable = Prunable(
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


# --- ticket


def ticket(**settings: object) -> Ticket:
    return Ticket(kind="ticket", **({"keep_ratio": 0.3, "rounds": 3, "train": Training(steps=3)} | settings))  # type: ignore[arg-type]


def smallest_out(model: MultiTaskModel, names: list[str], share: float, scope: Scope) -> dict[str, Tensor]:
    return keep_most(magnitude(model, names), alive(model, names), share, scope)


def masks_of_rounds(bench: Bench) -> list[dict[str, Tensor]]:
    return [load_file(file) for file in sorted(bench.directory.glob("masks-round-*.safetensors"))]


def test_masks_nest_count_exactly_and_spare_biases_and_norms(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket().run(model, bench)
    rounds = masks_of_rounds(bench)
    names = prunable_weights(model.module)
    assert names == ["stem.0.weight", "down.0.weight", "inner.0.weight", "outer.0.weight", "fused.weight",
                     "mask.0.weight", "mask.2.weight"]  # fmt: skip
    assert [sorted(masks) for masks in rounds] == [sorted(names)] * 3
    left = sum(get_tensor(model.module, name).numel() for name in names)
    for masks in rounds:
        left = round(0.3 ** (1 / 3) * left)
        assert sum(int(mask.sum()) for mask in masks.values()) == left
    for before, later in pairwise(rounds):
        assert all(not bool((later[name] & ~before[name]).any()) for name in names)
    assert all(torch.equal(after.masks[name], rounds[-1][name]) for name in names)
    for name, mask in after.masks.items():
        assert bool((get_tensor(after.module, name)[~mask] == 0).all())


def test_each_layer_keeps_the_same_share_when_asked(model: MultiTaskModel) -> None:
    masks = smallest_out(model, prunable_weights(model.module), 0.5, "layer")
    assert all(int(mask.sum()) == round(0.5 * mask.numel()) for mask in masks.values())


def test_ties_do_not_change_the_count(model: MultiTaskModel) -> None:
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(0.5)
    names = prunable_weights(model.module)
    total = sum(get_tensor(model.module, name).numel() for name in names)
    masks = smallest_out(model, names, 0.37, "global")
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.37 * total)


def test_blocks_of_outputs_stay_or_go_together(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=0.25, rounds=2, pattern="4x1").run(model, bench)
    assert bench.notes == ["pruned weight by weight, because their size does not fit '4x1': mask.2.weight."]
    left = total = 0
    for name, mask in after.masks.items():
        left, total = left + int(mask.sum()), total + mask.numel()
        if name != "mask.2.weight":
            together = mask.reshape(len(mask) // 4, 4, -1)
            assert torch.equal(together.any(1), together.all(1)), name
    assert 0.25 * total - 8 <= left <= 0.25 * total
    first, second = masks_of_rounds(bench)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)


def test_n_of_each_m_inputs_stay(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=None, rounds=2, pattern="1:4").run(model, bench)
    assert bench.notes == ["left whole, because their size does not fit '1:4': stem.0.weight."]
    for turn, masks in enumerate(masks_of_rounds(bench)):
        for name, mask in masks.items():
            if name == "stem.0.weight":
                assert bool(mask.all())
                continue
            each = mask.movedim(1, -1).reshape(-1, 4).sum(1)
            assert set(each.tolist()) == {(2, 1)[turn]}, name
    weight = get_tensor(model.module, "fused.weight").detach()
    kept = masks_of_rounds(bench)[0]["fused.weight"]
    assert torch.equal(kept, keep_n_of_m({"w": weight.abs()}, {"w": torch.ones_like(kept)}, 2, 4)["w"])
    assert float(weight[kept].abs().sum()) > float(weight[~kept].abs().sum())
    assert after.masks.keys() == masks_of_rounds(bench)[-1].keys()


def test_a_ticket_without_a_ratio_goes_as_far_as_the_budgets_allow(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, size=0.05)
    after = ticket(keep_ratio=None, rounds=12).run(model, bench)
    done = masks_of_rounds(bench)
    assert 0 < len(done) < 12 and not bench.short and "task 'size' would leave its budget" in bench.notes[0]
    left = sum(int(m.sum()) for m in done[-1].values()) / sum(m.numel() for m in done[-1].values())
    assert left == pytest.approx(0.8 ** len(done), rel=1e-3)
    assert bench.margins(bench.scores(after))["size"] >= 0


def test_a_weight_goes_when_every_task_ranks_it_low() -> None:
    one, other = {"w": torch.tensor([9.0, 5.0, 1.0, 0.0])}, {"w": torch.tensor([0.0, 0.1, 0.0, 0.2])}
    score = unanimous([one, other])
    assert score["w"].tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 1.0])
    mask = keep_most(score, {"w": torch.ones(4, dtype=torch.bool)}, 0.5, "global")
    assert mask["w"].tolist() == [True, False, False, True], "the best of either task"


def test_a_tasks_own_head_is_safe_from_the_others(model: MultiTaskModel, bench: Bench) -> None:
    """The mask head is worth nothing to the other tasks, but its own task's best weights stay."""
    names = prunable_weights(model.module)
    masks = keep_most(by_tasks(model, names, bench, 2), alive(model, names), 0.2, "global")
    assert int(masks["mask.2.weight"].sum()) > 0 and int(masks["fused.weight"].sum()) > 0
    stage = ticket(keep_ratio=0.2, rounds=1, saliency="tasks", calibrate_batches=2)
    assert all(torch.equal(mask, masks[name]) for name, mask in stage.run(model, bench).masks.items())


@pytest.mark.parametrize("text", ["", "4", "1x1", "4x2", "0:4", "4:2", "2:4x1", "x1", "free "])
def test_patterns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a pattern is"):
        Pattern.parse(text)
    with pytest.raises(ValueError, match="leave 'keep_ratio' out"):
        ticket(keep_ratio=0.5, pattern="2:4")


def test_a_survivor_that_became_zero_is_still_alive(model: MultiTaskModel) -> None:
    names = prunable_weights(model.module)
    model.masks = smallest_out(model, names, 0.5, "global")
    before = sum(int(mask.sum()) for mask in model.masks.values())
    model.module.down[0].weight.data.zero_()
    later = smallest_out(model, names, 1.0, "global")
    assert sum(int(mask.sum()) for mask in later.values()) == before
    assert all(torch.equal(later[name], model.masks[name]) for name in names)


@pytest.mark.parametrize("step", [0, 2])
def test_survivors_start_each_round_bit_for_bit_at_the_rewind_weights(
    model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    import compressor.stages.ticket as module

    starts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    monkeypatch.setattr(module, "train", _recording(module.train, starts))
    ticket(rewind_step=step).run(model, bench)
    rewound = starts[0][1] if step else dict(model.module.state_dict())
    if step:
        assert not torch.equal(rewound["fused.weight"], model.module.fused.weight)
        del starts[0]
    assert len(starts) == 3
    for (state, _), masks in zip(starts, masks_of_rounds(bench), strict=True):
        for name, value in state.items():
            mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, torch.where(mask, rewound[name], torch.zeros_like(value))), name


def _recording(plain: object, starts: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> object:
    """`train`, noting the state each training starts from and the snapshot it returns."""

    def train(model: MultiTaskModel, *args: object, **options: object) -> object:
        state = {name: value.clone() for name, value in model.module.state_dict().items()}
        saved = plain(model, *args, **options)  # type: ignore[operator]
        starts.append((state, saved))
        return saved

    return train


def test_rewinding_leaves_no_negative_zero_and_no_shared_memory(model: MultiTaskModel) -> None:
    masks = smallest_out(model, prunable_weights(model.module), 0.5, "global")
    state = dict(model.module.state_dict())
    copy = rewind(model, state, masks)
    weight = copy.module.down[0].weight
    assert not bool(torch.signbit(weight[~masks["down.0.weight"]]).any())
    weight.data.add_(1)
    assert not torch.equal(weight, state["down.0.weight"])


def test_a_ticket_stops_at_a_budget_with_the_round_before(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, size=0.05)
    after = ticket(keep_ratio=0.01, rounds=6).run(model, bench)
    done = masks_of_rounds(bench)
    assert len(done) < 6 and "task 'size' would leave its budget by" in bench.notes[0]
    assert bench.margins(bench.scores(after))["size"] >= 0
    if done:
        assert all(torch.equal(after.masks[name], mask) for name, mask in done[-1].items())
    else:
        assert after is model


def test_masks_survive_finetune_and_a_later_prune(model: MultiTaskModel, bench: Bench) -> None:
    sparse = ticket(rounds=1).run(model, bench)
    tuned = Finetune(kind="finetune", steps=4, learning_rate=1e-2, weight_decay=0.1).run(sparse, bench)
    pruned = prune(macs=0.6, rounds=1, recover=Training(steps=2)).run(tuned, bench)
    for after in (tuned, pruned):
        assert after.masks.keys() == sparse.masks.keys()
        for name, mask in after.masks.items():
            weight = get_tensor(after.module, name)
            assert weight.shape == mask.shape
            assert bool((weight[~mask] == 0).all())
    assert sizes_of(pruned)[1] < sizes_of(tuned)[1]
    again = ticket(rounds=1, keep_ratio=0.5).run(pruned, bench)
    assert all(not bool((again.masks[n] & ~pruned.masks[n]).any()) for n in pruned.masks), "a second ticket nests in it"


def test_weights_tied_between_layers_are_pruned_once() -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert prunable_weights(nn.Sequential(a, b)) == ["0.weight"]


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
    assert bench.short and bench.notes[-1] == "prune ended at 90.0% of the original's latency instead of 50.0%."


def test_a_network_that_is_fast_enough_is_left_as_it_is(model: MultiTaskModel, bench: Bench) -> None:
    bench.speed = lambda _: 0.4
    assert prune(latency=0.5, rounds=1).run(model, bench) is model
    assert bench.notes == ["nothing was pruned: the latency is within 50.0% of the original's as it is."]


def test_a_latency_goal_needs_a_device(model: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match="no device to measure it on"):
        prune(latency=0.5).run(model, bench)


def test_speed_is_a_share_of_the_originals(model: MultiTaskModel) -> None:
    from networks import cpu_device, host_bits

    from compressor.speed import Speed
    from targets.cpu import CpuTarget

    speed = Speed(model, CpuTarget(), cpu_device(bits=host_bits()), 1, 0)
    assert 0.5 < speed(model) < 2.0, "the same network, on a machine that others use"
