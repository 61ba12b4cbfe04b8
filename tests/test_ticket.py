"""Lottery tickets: what goes, what is left where, what is rewound to what, and how far budgets let it go."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compressor.checkpoint as checkpoint
import compressor.thresholds as thresholds
import compressor.training as training
from compressor.bench import Bench
from compressor.channels import Axis
from compressor.components import components, left_by_component, names_of_components
from compressor.errors import CompressError
from compressor.graph import tensor_of
from compressor.masks import Pattern, Scope, count, keep_most, keep_n_of_m, pools_of, shares, unanimous
from compressor.model import MultiTaskModel
from compressor.record import sizes_of
from compressor.saliency import alive, by_layer, by_tasks, magnitude, prunable
from compressor.stages.finetune import Finetune
from compressor.stages.prune import Prune
from compressor.stages.ticket import Ticket, rewind
from compressor.thresholds import learnt
from compressor.training import Training, train


def ticket(**settings: object) -> Ticket:
    """`rounds=None` leaves them out."""
    given = {"keep_ratio": 0.3, "rounds": 3, "train": Training(steps=3)} | settings
    return Ticket(kind="ticket", **{key: value for key, value in given.items() if (key, value) != ("rounds", None)})  # type: ignore[arg-type]


def best(
    score: Mapping[str, Tensor], living: Mapping[str, Tensor], share: float, scope: Scope = "global"
) -> dict[str, Tensor]:
    pool = pools_of({name: torch.zeros(mask.shape, dtype=torch.int64) for name, mask in living.items()}, scope, 1)
    return keep_most(score, living, pool, [round(share * size) for size in count(pool, living)])


def smallest_out(model: MultiTaskModel, names: list[str], share: float, scope: Scope) -> dict[str, Tensor]:
    return best(magnitude(model, names), alive(model, names), share, scope)


def kept(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def nest(rounds: list[dict[str, Tensor]]) -> bool:
    return not any(bool((later[n] & ~before[n]).any()) for before, later in pairwise(rounds) for n in later)


def masks_of_rounds(bench: Bench) -> list[dict[str, Tensor]]:
    return [load_file(file) for file in sorted(bench.directory.glob("masks-round-*.safetensors"))]


def test_masks_nest_count_exactly_and_spare_biases_and_norms(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket().run(model, bench)
    rounds = masks_of_rounds(bench)
    names = prunable(model.module)
    assert names == ["stem.0.weight", "down.0.weight", "inner.0.weight", "outer.0.weight", "fused.weight",
                     "mask.0.weight", "mask.2.weight"]  # fmt: skip
    assert [sorted(masks) for masks in rounds] == [sorted(names)] * 3
    total = sum(tensor_of(model.module, name).numel() for name in names)
    for turn, masks in enumerate(rounds, 1):
        assert kept(masks) == round(0.3 ** (turn / 3) * total)
    assert nest(rounds)
    assert all(torch.equal(after.masks[name], rounds[-1][name]) for name in names)
    for name, mask in after.masks.items():
        assert bool((tensor_of(after.module, name)[~mask] == 0).all())


def test_each_layer_keeps_the_same_share_when_asked(model: MultiTaskModel) -> None:
    masks = smallest_out(model, prunable(model.module), 0.5, "layer")
    assert all(int(mask.sum()) == round(0.5 * mask.numel()) for mask in masks.values())


def test_ties_do_not_change_the_count(model: MultiTaskModel) -> None:
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(0.5)
    names = prunable(model.module)
    total = sum(tensor_of(model.module, name).numel() for name in names)
    masks = smallest_out(model, names, 0.37, "global")
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.37 * total)


def test_blocks_of_outputs_stay_or_go_together(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=0.25, rounds=2, pattern="4x1").run(model, bench)
    assert bench.notes[0] == "pruned weight by weight, because their size does not fit '4x1': mask.2.weight."
    left = total = 0
    for name, mask in after.masks.items():
        left, total = left + int(mask.sum()), total + mask.numel()
        if name != "mask.2.weight":
            together = mask.reshape(len(mask) // 4, 4, -1)
            assert torch.equal(together.any(1), together.all(1)), name
    assert 0.25 * total - 8 <= left <= 0.25 * total
    assert nest(masks_of_rounds(bench))


def test_tiles_stay_or_go_together_whatever_the_size(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=0.25, rounds=2, pattern="3x5").run(model, bench)
    left = total = 0
    for mask in after.masks.values():
        left, total = left + int(mask.sum()), total + mask.numel()
        wide = mask.reshape(*mask.shape[:2], -1)
        for y in range(0, wide.shape[0], 3):
            for x in range(0, wide.shape[1], 5):
                tile = wide[y : y + 3, x : x + 5]
                assert torch.equal(tile.any(0).any(0), tile.all(0).all(0))
    assert 0.25 * total - 15 <= left <= 0.25 * total
    assert nest(masks_of_rounds(bench))


def test_n_of_each_m_inputs_stay(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=None, rounds=2, pattern="1:4").run(model, bench)
    assert bench.notes[0] == "left whole, because their size does not fit '1:4': stem.0.weight."
    for turn, masks in enumerate(masks_of_rounds(bench)):
        for name, mask in masks.items():
            if name == "stem.0.weight":
                assert bool(mask.all())
                continue
            each = mask.movedim(1, -1).reshape(-1, 4).sum(1)
            assert set(each.tolist()) == {(2, 1)[turn]}, name
    weight = tensor_of(model.module, "fused.weight").detach()
    kept = masks_of_rounds(bench)[0]["fused.weight"]
    assert torch.equal(kept, keep_n_of_m({"w": weight.abs()}, {"w": torch.ones_like(kept)}, 2, 4)["w"])
    assert float(weight[kept].abs().sum()) > float(weight[~kept].abs().sum())
    assert after.masks.keys() == masks_of_rounds(bench)[-1].keys()


def test_a_ticket_without_a_ratio_goes_as_far_as_the_budgets_allow(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, size=0.05)
    after = ticket(keep_ratio=None, rounds=12, retries=0).run(model, bench)
    done = masks_of_rounds(bench)
    assert 0 < len(done) < 12 and not bench.short and "task 'size' would leave its budget" in bench.notes[0]
    left = sum(int(m.sum()) for m in done[-1].values()) / sum(m.numel() for m in done[-1].values())
    assert left == pytest.approx(0.8 ** len(done), rel=1e-3)
    assert bench.margins(bench.scores(after))["size"] >= 0


def test_a_weight_goes_when_every_task_ranks_it_low() -> None:
    one, other = {"w": torch.tensor([9.0, 5.0, 1.0, 0.0])}, {"w": torch.tensor([0.0, 0.1, 0.0, 0.2])}
    score = unanimous([one, other])
    assert score["w"].tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 1.0])
    mask = best(score, {"w": torch.ones(4, dtype=torch.bool)}, 0.5)
    assert mask["w"].tolist() == [True, False, False, True], "the best of either task"


def test_a_tasks_own_head_is_safe_from_the_others(model: MultiTaskModel, bench: Bench) -> None:
    """The mask head is worth nothing to the other tasks, but its own task's best weights stay."""
    names = prunable(model.module)
    masks = best(by_tasks(model, names, bench, 2), alive(model, names), 0.2)
    assert int(masks["mask.2.weight"].sum()) > 0 and int(masks["fused.weight"].sum()) > 0
    stage = ticket(keep_ratio=0.2, rounds=1, saliency="tasks", calibrate_batches=2)
    assert all(torch.equal(mask, masks[name]) for name, mask in stage.run(model, bench).masks.items())


def test_a_share_of_its_layer_is_of_survivors_no_smaller(model: MultiTaskModel) -> None:
    """Dead weights, however large, are worth nothing and count for nothing."""
    name = "mask.2.weight"
    weight = tensor_of(model.module, name)
    mask = torch.zeros_like(weight, dtype=torch.bool).flatten()
    mask[:3] = True
    model.masks = {name: mask.view_as(weight)}
    with torch.no_grad():
        weight.fill_(100.0).flatten()[:3] = torch.tensor([-1.0, 3.0, 2.0])
    found = by_layer(model, [name], (1, 1))[name].flatten()
    torch.testing.assert_close(found[:3], torch.tensor([1 / 14, 9 / 9, 4 / 13], dtype=torch.float64))
    assert not bool(found[3:].any())


def test_a_layer_that_keeps_less_than_a_block_keeps_one(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=0.02, rounds=1, pattern="8x16", scope="layer").run(model, bench)
    assert all(bool(mask.any()) for mask in after.masks.values())


def test_a_block_has_its_share_of_a_layer_together() -> None:
    """Two rows of a column are a block: energies of 16, 4, 8 and of a lone survivor's 2; of equal means the earlier."""
    energy = torch.tensor([[10.0, 1.0], [6.0, 3.0], [4.0, 2.0], [4.0, 7.0]])
    living = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    found = shares({"a": energy}, {"a": living}, (2, 1))["a"].tolist()
    first, second, third, last = 16 / 16 / 2, 8 / 24 / 2, 4 / 28 / 2, 2 / 30
    assert found == [pytest.approx(row) for row in ([first, third], [first, third], [second, last], [second, 0])]


def test_by_shares_of_layers_none_is_lost_and_each_keeps_its_largest(model: MultiTaskModel, bench: Bench) -> None:
    with torch.no_grad():
        model.module.fused.weight.mul_(1e-3)  # by magnitude it would go whole
    names = prunable(model.module)
    assert not bool(best(magnitude(model, names), alive(model, names), 0.1)["fused.weight"].any())
    stage = ticket(keep_ratio=0.1, rounds=1, saliency="layers", train=Training(steps=0))
    masks = stage.run(model, bench).masks
    for name, mask in masks.items():
        size = tensor_of(model.module, name).detach().abs()
        assert bool(mask.any()) and float(size[mask].min()) >= float(size[~mask].max()), name
    small, *_, large = sorted(masks.values(), key=Tensor.numel)
    assert float(small.float().mean()) > float(large.float().mean())


@pytest.mark.parametrize("text", ["", "4", "1x1", "1x4", "0:4", "4:2", "2:4x1", "x1", "free "])
def test_patterns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a pattern is"):
        Pattern.parse(text)


def test_a_survivor_that_became_zero_is_still_alive(model: MultiTaskModel) -> None:
    names = prunable(model.module)
    model.masks = smallest_out(model, names, 0.5, "global")
    before = sum(int(mask.sum()) for mask in model.masks.values())
    model.module.down[0].weight.data.zero_()
    later = smallest_out(model, names, 1.0, "global")
    assert sum(int(mask.sum()) for mask in later.values()) == before
    assert all(torch.equal(later[name], model.masks[name]) for name in names)


@pytest.mark.parametrize("to", ["trained", 2, "init"])
def test_survivors_start_each_round_bit_for_bit_at_the_rewind_weights(
    model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch, to: str | int
) -> None:
    """So do batch norm and all else that is not pruned, after channels are gone as well."""
    import compressor.stages.ticket as module

    model.cut({Axis("mask.0.weight", 0): torch.arange(2, 16), Axis("mask.0.bias", 0): torch.arange(2, 16),
               Axis("mask.2.weight", 1): torch.arange(2, 16)})  # fmt: skip
    starts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    monkeypatch.setattr(module, "train", _recording(module.train, starts))
    bench.seed = 5
    ticket(rewind=to, saliency="magnitude").run(model, bench)
    rewound = starts[0][1] if to == 2 else dict(model.module.state_dict())
    if to == "init":
        torch.manual_seed(5)
        rewound = dict(bench.workload.build().state_dict())
        rewound |= {"mask.0.weight": rewound["mask.0.weight"][2:], "mask.0.bias": rewound["mask.0.bias"][2:],
                    "mask.2.weight": rewound["mask.2.weight"][:, 2:]}  # fmt: skip
    if to != "trained":
        assert not torch.equal(rewound["fused.weight"], model.module.fused.weight)
    if to == 2:
        del starts[0]
    rounds = masks_of_rounds(bench)
    assert len(starts) == len(rounds) == 3
    by_size = smallest_out(model, list(rounds[0]), 0.3 ** (1 / 3), "global")
    assert to == 2 or all(torch.equal(mask, by_size[name]) for name, mask in rounds[0].items())
    for (state, _), masks in zip(starts, rounds, strict=True):
        for name, value in state.items():
            mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, torch.where(mask, rewound[name], torch.zeros_like(value))), name


def test_without_rewinding_survivors_start_each_round_where_the_last_left_them(
    model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm's statistics and all else that is not pruned as well."""
    import compressor.stages.ticket as module

    plain, before = module.train, [dict(model.module.state_dict())]

    def train(candidate: MultiTaskModel, *args: object, **options: object) -> object:
        for name, value in candidate.module.state_dict().items():
            mask = candidate.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, torch.where(mask, before[-1][name], torch.zeros_like(value))), name
        saved = plain(candidate, *args, **options)  # type: ignore[arg-type]
        before.append({name: value.clone() for name, value in candidate.module.state_dict().items()})
        return saved

    monkeypatch.setattr(module, "train", train)
    after = ticket(rewind="none").run(model, bench)
    assert len(before) == 4
    assert all(torch.equal(value, before[-1][name]) for name, value in after.module.state_dict().items())


def _recording(plain: object, starts: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> object:
    """`train`, noting the state each training starts from and the snapshot it returns."""

    def train(model: MultiTaskModel, *args: object, **options: object) -> object:
        state = {name: value.clone() for name, value in model.module.state_dict().items()}
        saved = plain(model, *args, **options)  # type: ignore[operator]
        starts.append((state, saved))
        return saved

    return train


def test_rewinding_leaves_no_negative_zero_and_no_shared_memory(model: MultiTaskModel) -> None:
    masks = smallest_out(model, prunable(model.module), 0.5, "global")
    state = dict(model.module.state_dict())
    copy = rewind(model, state, masks)
    weight = copy.module.down[0].weight
    assert not bool(torch.signbit(weight[~masks["down.0.weight"]]).any())
    weight.data.add_(1)
    assert not torch.equal(weight, state["down.0.weight"])


def test_a_ticket_stops_at_a_budget_with_the_round_before(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, size=0.05)
    after = ticket(keep_ratio=0.01, rounds=6, retries=0).run(model, bench)
    done = masks_of_rounds(bench)
    assert len(done) < 6 and "task 'size' would leave its budget by" in bench.notes[0] and bench.short
    assert bench.margins(bench.scores(after))["size"] >= 0
    if done:
        assert all(torch.equal(after.masks[name], mask) for name, mask in done[-1].items())
    else:
        assert after is model


def test_masks_survive_finetune_and_a_later_prune(model: MultiTaskModel, bench: Bench) -> None:
    sparse = ticket(rounds=1).run(model, bench)
    tuned = Finetune(kind="finetune", steps=4, learning_rate=1e-2, weight_decay=0.1).run(sparse, bench)
    prune = Prune(kind="prune", macs=0.6, rounds=1, batches=2, round_to=4, recover=Training(steps=2))
    pruned = prune.run(tuned, bench)
    for after in (tuned, pruned):
        assert after.masks.keys() == sparse.masks.keys()
        for name, mask in after.masks.items():
            weight = tensor_of(after.module, name)
            assert weight.shape == mask.shape
            assert bool((weight[~mask] == 0).all())
    assert sizes_of(pruned)[1] < sizes_of(tuned)[1]
    again = ticket(rounds=1, keep_ratio=0.5).run(pruned, bench)
    assert all(not bool((again.masks[n] & ~pruned.masks[n]).any()) for n in pruned.masks), "a second ticket nests in it"


def test_weights_tied_between_layers_are_pruned_once() -> None:
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert prunable(nn.Sequential(a, b)) == ["0.weight"]


def test_what_an_earlier_ticket_pruned_stays_pruned(model: MultiTaskModel, bench: Bench) -> None:
    """Also where a later one would not prune it."""
    first = ticket(rounds=1, prune_also=["bias", "norm"]).run(model, bench)
    later = ticket(rounds=1, keep_ratio=0.5, rewind="init").run(first, bench)
    assert nest([first.masks, later.masks]) and kept(first.masks) > kept(later.masks)
    for name in ("stem.1.weight", "mask.0.bias"):
        assert torch.equal(later.masks[name], first.masks[name])
        assert bool((tensor_of(later.module, name)[~later.masks[name]] == 0).all())


def test_biases_norms_and_raw_parameters_are_pruned_when_asked() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.0))
            self.conv, self.norm, self.table = nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.Embedding(2, 3)

    assert prunable(Net()) == ["conv.weight"]
    assert prunable(Net(), ["bias"]) == ["conv.weight", "conv.bias"]
    assert prunable(Net(), ["norm"]) == ["conv.weight", "norm.weight", "norm.bias"]
    assert prunable(Net(), ["other"]) == ["raw", "conv.weight", "table.weight"]


# --- goals


def test_a_schedule_says_what_is_left_after_each_round(model: MultiTaskModel, bench: Bench) -> None:
    stage = ticket(keep_ratio=None, schedule=[0.6, 0.5, 0.1], rounds=None)
    after = stage.run(model, bench)
    total = sum(mask.numel() for mask in after.masks.values())
    assert [kept(masks) for masks in masks_of_rounds(bench)] == [round(r * total) for r in (0.6, 0.5, 0.1)]
    assert nest(masks_of_rounds(bench)) and stage.train_steps == 9 and not bench.short


def test_components_are_told_apart_by_who_reads_them(model: MultiTaskModel) -> None:
    with torch.no_grad():
        model.module.outer[0].weight.zero_()  # whatever the weights are
    part = components(model, [name for name, _ in model.module.named_parameters()])
    assert names_of_components(model) == ["shared", "kind", "size", "mask"]
    assert {name: set(number.unique().tolist()) for name, number in part.items() if bool((number > 0).any())} == {
        "fused.weight": {1, 2}, "fused.bias": {1, 2}, "mask.0.weight": {3}, "mask.0.bias": {3}, "mask.2.weight": {3},
        "mask.2.bias": {3},
    }  # fmt: skip
    assert part["fused.weight"][:, 7].tolist() == [1, 1, 1, 2]
    four, three = (components(model, ["fused.weight"], block=(rows, 1))["fused.weight"] for rows in (4, 3))
    assert four.unique().tolist() == [0], "a block of both"
    assert three[:, 0].tolist() == [1, 1, 1, 2], "no multiple"


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_each_component_keeps_its_own_share(model: MultiTaskModel, bench: Bench, scope: str) -> None:
    goal = {"shared": 0.5, "size": 1.0, "mask": 0.1}
    after = ticket(keep_ratio=0.25, keep=goal, rounds=2, scope=scope).run(model, bench)
    found = left_by_component(after, components(model, list(after.masks)))
    for name, (left, whole) in found.items():
        assert left == pytest.approx({"kind": 0.25, **goal}[name] * whole, abs=4 if scope == "layer" else 0.5)
    told = ", ".join(f"{name} {left / whole:.1%}" for name, (left, whole) in found.items())
    assert bench.notes == [f"weights left: {told}."] and "shared 50.0%, kind 25" in told
    assert nest(masks_of_rounds(bench))


def test_what_no_goal_names_stays_whole(model: MultiTaskModel, bench: Bench) -> None:
    after = ticket(keep_ratio=None, keep={"mask": 0.2}, rounds=1, saliency="magnitude").run(model, bench)
    assert {name for name, mask in after.masks.items() if not bool(mask.all())} == {"mask.0.weight", "mask.2.weight"}


def test_a_goal_for_what_is_no_component_is_refused(model: MultiTaskModel, bench: Bench) -> None:
    with pytest.raises(CompressError, match=r"keep: no component 'mas' has weights. Did you mean 'mask'\?"):
        ticket(keep={"mas": 0.5}).run(model, bench)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "2:4"}, "leave 'keep_ratio' out"),
        ({"keep_ratio": None, "schedule": [0.5], "pattern": "2:4"}, "leave 'schedule' out"),
        ({"keep_ratio": None, "pattern": "2:4", "saliency": "learnt"}, "which '2:4' fixes"),
        ({"schedule": [0.5, 0.1], "keep": {"a": 0.1}}, "leave 'keep_ratio', 'keep' out"),
        ({"keep_ratio": None, "schedule": [0.5]}, "leave 'rounds' out"),
        ({"keep_ratio": None, "rounds": None, "schedule": [0.5, 0.5]}, "falls from round to round"),
        ({"keep_ratio": None, "rounds": None, "schedule": [1.0, 0.5]}, "falls from round to round"),
        ({"keep": {"a": 0.0}}, "'keep.a' is a fraction above 0, up to 1"),
        ({"saliency": "learnt", "scope": "layer"}, "leave 'keep' and scope 'layer' out"),
        ({"saliency": "learnt", "train": {"steps": 0}}, "let 'train' have steps"),
        ({"rewind": "inti"}, "'rewind' is 'none', 'trained', 'init' or a number of steps, not 'inti'"),
        ({"rewind": "init", "train": {"steps": 0}}, "needs 'train' to have steps"),
        ({"rewind": 4}, "'rewind' is 4, but 'train' has 3 steps"),
        ({"rewind": 0}, "'rewind' is 0, but"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ticket(**settings)


# --- as far as the budgets allow


def breaks_below(bench: Bench, density: float) -> None:
    """Budgets that hold as long as so many weights are left."""
    bench.scores = lambda model: {"left": kept(model.masks) / sum(m.numel() for m in model.masks.values())}  # type: ignore[assignment, method-assign]
    bench.over = lambda scores, _: "task 'left' would leave" if scores["left"] < density else ""  # type: ignore[method-assign]


@pytest.mark.parametrize(("goal", "rounds"), [(0.1, 2), (0.1, 1), (None, 6)])
def test_the_density_that_budgets_allow_is_searched_between_rounds(
    model: MultiTaskModel, bench: Bench, goal: float | None, rounds: int
) -> None:
    breaks_below(bench, 0.37)
    reached = []
    for retries in (0, 2, 5):
        bench.notes, bench.short = [], False
        stage = ticket(keep_ratio=goal, rounds=rounds, retries=retries, train=Training(steps=0), calibrate_batches=1)
        after = stage.run(model, bench)
        reached.append(bench.scores(after)["left"] if after is not model else 1.0)
        assert bench.short == (goal is not None)
        said = f"ticket stopped with {reached[-1]:.1%} of the weights left: with "
        assert bench.notes[0].startswith(said) and bench.notes[0].endswith("% task 'left' would leave.")
    assert reached[0] > reached[1] >= reached[2] and 0.37 <= reached[2] < 0.4
    rounds_kept = masks_of_rounds(bench)
    assert nest(rounds_kept) and kept(rounds_kept[-1]) == kept(after.masks)


def test_a_search_ends_where_nothing_lies_between(model: MultiTaskModel, bench: Bench) -> None:
    """Of each four inputs three stay, or two: the search knows it without a try."""
    breaks_below(bench, 0.6)
    stage = ticket(keep_ratio=None, pattern="1:4", rounds=3, retries=9, train=Training(steps=0), calibrate_batches=1)
    asked: list[int] = []
    plain = bench.scores
    bench.scores = lambda model: asked.append(1) or plain(model)  # type: ignore[assignment, method-assign, func-returns-value]
    after = stage.run(model, bench)
    assert len(asked) == 2 and bench.short
    assert set(after.masks["fused.weight"].reshape(-1, 4).sum(1).tolist()) == {3}


# --- learnt thresholds


def test_a_component_that_no_loss_protects_loses_most(model: MultiTaskModel, bench: Bench) -> None:
    """The same density overall, exactly; who has it follows from the losses."""
    found = []
    for weight in (0.0, 10.0):
        how = Training(steps=16, learning_rate=2e-2, distill="always", loss_weights={"mask": weight})
        after = ticket(saliency="learnt", keep_ratio=0.3, rounds=1, train=how).run(model, bench)
        assert kept(after.masks) == round(0.3 * sum(mask.numel() for mask in after.masks.values()))
        assert list(after.module.state_dict()) == list(model.module.state_dict()), "no threshold is left behind"
        left, whole = left_by_component(after, components(model, list(after.masks)))["mask"]
        found.append(left / whole)
    assert found[0] < 0.5 * found[1]


def test_thresholds_hold_the_number_left_to_its_course(
    model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network trains with as many weights as are asked for at last; what was pruned before stays at zero."""
    seen: list[list[int]] = []

    def watching(model: MultiTaskModel, *args: object) -> None:
        layers = [model.module.down[0], model.module.fused]
        model.module.register_forward_hook(
            lambda part, *_: seen.append([int((x.weight != 0).sum()) for x in layers]) if part.training else None
        )
        train(model, *args)  # type: ignore[arg-type]
        assert bool((layers[0].weight[~dead] == 0).all())

    monkeypatch.setattr(thresholds, "train", watching)
    names = ["down.0.weight", "fused.weight"]
    dead = torch.rand(32, 16, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    model.masks = {"down.0.weight": dead}
    model.module.down[0].weight.data.mul_(dead)
    first = kept(alive(model, names))
    score = learnt(model, components(model, names), (first, 400), bench, Training(steps=8), "x", 0)
    totals = [sum(each) for each in seen]
    course = [round(400 + (first - 400) * (1 - done / 8) ** 3) for done in range(1, 9)]
    assert totals == pytest.approx(course, abs=3)
    masks = best(score, alive(model, names), 400 / first)
    assert kept(masks) == 400 and not bool((masks["down.0.weight"] & ~dead).any())


def test_learning_thresholds_goes_on_where_it_was_killed(
    model: MultiTaskModel, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = components(model, ["inner.0.weight", "fused.weight"])
    told = (part, (9000, 3000), bench, Training(steps=6, learning_rate=1e-2), "x", 0)
    wanted = learnt(model, *told)
    bench.checkpoints = tmp_path / "checkpoints"
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    plain, calls = training._losses, iter(range(100))

    def deadly(*args: object) -> dict[str, Tensor]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_losses", deadly)
    with pytest.raises(KeyboardInterrupt):
        learnt(model, *told)
    again = learnt(model, *told)
    assert next(calls) == 7 and all(torch.equal(score, again[name]) for name, score in wanted.items())


def test_a_weight_that_two_layers_share_has_one_threshold(
    model: MultiTaskModel, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.module.inner[0].weight = model.module.outer[0].weight

    def watching(model: MultiTaskModel, *args: object) -> None:
        train(model, *args)  # type: ignore[arg-type]
        inner, outer = model.module.inner[0].weight, model.module.outer[0].weight
        assert torch.equal(inner, outer) and int((outer != 0).sum()) == pytest.approx(1000, abs=50)

    monkeypatch.setattr(thresholds, "train", watching)
    score = learnt(model, components(model, ["inner.0.weight"]), (9216, 1000), bench, Training(steps=2), "x", 0)
    assert list(score) == ["inner.0.weight"]
