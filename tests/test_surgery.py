"""Every construct of `tests/constructs.py`: what can go of it, and that the cut answers as zeroed and saves as told."""

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from compressor.criteria import CRITERIA
from compressor.errors import CompressError
from compressor.groups import Prunable, left_whole
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.norms import over_what_is_left
from compressor.pathway import extract
from compressor.trace import trace
from compressor.workload import Batch
from tests.constructs import CONSTRUCTS
from tests.models import Lambda, conv, of

ATTENTION = {"stem": 8, "mix.q": 4}

FOUND: dict[str, tuple[dict[str, int], dict[str, list[str]]]] = {
    "many groups": ({"0": 6}, {}),
    "few groups": ({"0": 6, "1": 9}, {}),
    "transposed, many groups": ({"0": 6}, {}),
    "transposed, few groups": ({"0": 6, "1": 4}, {}),
    "resnext": ({"stem": 8, "a": 8}, {}),
    "shufflenet": ({"stem": 8, "a": 2}, {}),
    "shufflenet v2": ({"stem": 4, "a": 4}, {}),
    "inverted residual": ({"stem": 4, "up": 12, "sq": 3}, {}),
    "convnext": ({"up": 12}, {"layer_norm": ["stem", "dw"], "add": ["down"]}),
    "dense net": ({"stem": 4, "a": 3, "b": 5}, {}),
    "stages": ({"stem": 6, "a": 4, "c": 4, "skip": 8, "e": 8, "g": 5}, {}),
    "group norm": ({"stem": 4, "up": 6}, {}),
    "one group's norm": ({}, {"group_norm": ["0"]}),
    "norm of an input": ({"a": 6}, {}),
    "norm without weights": ({}, {"layer_norm": ["stem"]}),
    "norm scaled by hand": ({"a": 6}, {}),
    "mean as a gate": ({"a": 6}, {"mean": ["gate"]}),
    "one token of its own": ({"stem": 8}, {}),
    "norms by hand": ({}, {"mean": ["0"]}),
    "root mean square": ({}, {"rms_norm": ["stem"]}),
    "norm of each head": ({"stem": 2}, {}),
    "channel shuffle": ({"0": 4}, {}),
    **dict.fromkeys(
        ["experts, each weighed", "experts, batched", "experts by einsum"],
        ({"a": 6, "a2": 4, "b": 7}, {"softmax": ["gate"]}),
    ),
    **dict.fromkeys(
        ["experts in one tensor, by einsum", "experts in one tensor, by matmul"],
        ({"stem": 6, "up": 8}, {"softmax": ["gate"]}),
    ),
    "interactions": ({"a": 4}, {}),
    "pixel shuffle": ({"0": 4}, {}),
    "glu": ({"0": 4}, {}),
    "gated by chunk": ({"a": 4}, {}),
    "swapped chunks": ({"a": 4}, {}),
    "side by side": ({"a": 6}, {}),
    "called twice": ({"a": 6}, {}),
    "weight used twice": ({"a": 6}, {}),
    "flatten after permute": ({"a": 6}, {}),
    "raw parameters": ({"a": 6}, {}),
    "matrix": ({"a": 6, "w": 10}, {}),
    "einsum with a matrix": ({"a": 6, "w": 8}, {}),
    "matrix from the left": ({"a": 6, "w": 10}, {}),
    "graph": ({"stem": 8}, {}),
    "largest of all positions": ({"a": 6}, {}),
    "larger of two": ({"a": 6}, {}),
    "two towers": ({"a": 6}, {"add": ["c"]}),
    "scale by a function": ({"a": 6}, {}),
    "scale of two parameters": ({"a": 6}, {}),
    "heads, weighed and summed": ({"a": 3}, {}),
    "rows mixed": ({"a": 6}, {}),
    "sampled": ({"a": 6}, {"grid_sampler": ["at"]}),
    "halves by slices": ({"a": 4}, {}),
    "outside autocast": ({"a": 6}, {}),
    "two inputs and outputs": ({"a": 6}, {}),
    "token mlp": ({"up": 12}, {"layer_norm": ["stem"], "add": ["down"]}),
    "positions and words": ({}, {}),
    "attention, matmul": (ATTENTION, {}),
    "attention, sdpa": (ATTENTION, {}),
    "attention, einsum": (ATTENTION, {}),
    "attention, linear": (ATTENTION, {}),
    "grouped queries": ({"stem": 8, "mix.q": 2, "mix.o": 8}, {}),
    "cross-attention": ({**ATTENTION, "other": 7}, {}),
    "attention from one layer": ({"stem": 8, "mix.qkv": 4}, {}),
    "one head": ({"stem": 8, "q": 6, "v": 10}, {}),
    "one head, scaled by its width": ({"stem": 8, "v": 10}, {"scaled_dot_product_attention": ["q", "k"]}),
    "one head by chunk": ({"stem": 8, "qkv": 6}, {}),
    "recurrent": ({}, {"gru": ["stem"]}),
    "gram matrix": ({}, {"matmul": ["a"]}),
}
"""How many channels, or heads, or groups of channels each named layer can lose, and what holds which others."""

SHRUNK = {
    "convnext": {"stem": 6, "up": 12},
    "one group's norm": {"0": 6},
    "norm without weights": {"stem": 8},
    "mean as a gate": {"a": 6, "gate": 5},
    "norms by hand": {"0": 6},
    "root mean square": {"stem": 8},
    "token mlp": {"stem": 8, "up": 12},
}
"""What can go where norms may go over fewer channels."""

REFUSED = {
    "uneven split": "a",
    "multi-head module": "mix.in_proj_weight",
    "transformer layer": "mix.self_attn.in_proj_weight",
}
"""A group that the module's own code fixes."""

TAKEN_APART = {
    "many groups", "few groups", "transposed, many groups", "transposed, few groups", "group norm", "glu", "matrix",
    "attention, sdpa", "attention, linear",
}  # fmt: skip
"""Constructs that the graph's own cut has a rule for: of these the pathway of the zeroed network is as small."""


def made(name: str) -> MultiTaskModel:
    torch.manual_seed(0)
    module, inputs = CONSTRUCTS[name]()
    return of(module, *inputs, tasks=2 if name.endswith("outputs") else 1)


def some_kept(prunable: Prunable, seed: int) -> Tensor:
    """Half of each group is gone."""
    keep, chance = prunable.keep_all(), random.Random(seed)
    for group in prunable.groups:
        keep[torch.tensor(chance.sample(group.classes.tolist(), len(group) // 2), dtype=torch.int64)] = False
    return keep


def test_every_construct_has_its_say() -> None:
    assert FOUND.keys() | REFUSED.keys() == CONSTRUCTS.keys()


@pytest.mark.parametrize("name", FOUND)
def test_what_can_go_goes_as_zeroed_and_saves_what_was_told(name: str) -> None:
    model = made(name)
    prunable = Prunable.of(model)
    groups, whole = FOUND[name]
    assert {group.name: len(group) for group in prunable.groups} == groups
    assert left_whole(prunable.channels) == whole
    keep = some_kept(prunable, 0)
    cut = prunable.cut(model, keep)  # which compares it with the zeroed network
    macs, parameters = prunable.cost(keep)
    assert (macs, parameters) == (count_macs(trace(cut))[0], sum(p.numel() for p in cut.module.parameters()))
    assert macs < prunable.cost(prunable.keep_all())[0] or not groups
    if name in TAKEN_APART:
        prunable.silence(model.module, keep)
        assert extract(model, ["t0"]).macs == macs


@pytest.mark.parametrize("name", FOUND)
def test_norms_go_over_fewer_channels_only_where_that_is_asked_for(name: str) -> None:
    model = made(name)
    prunable = Prunable.of(model, shrinks=True)
    assert {group.name: len(group) for group in prunable.groups} == SHRUNK.get(name, FOUND[name][0])
    if name not in SHRUNK:
        assert not prunable.channels.norms
        return
    keep = some_kept(prunable, 0)
    cut, before = prunable.cut(model, keep), model.module.state_dict()
    assert prunable.cost(keep) == (count_macs(trace(cut))[0], sum(p.numel() for p in cut.module.parameters()))
    for name, value in cut.module.state_dict().items():
        for dim, indices in cut.kept.get(name, {}).items():
            before[name] = before[name].index_select(dim, torch.tensor(indices))
        assert torch.equal(value, before[name]), "its own code, of fewer channels"


def test_a_norm_that_goes_over_fewer_channels_does_not_hide_those_picked_by_number() -> None:
    torch.manual_seed(0)
    module = Lambda(
        lambda m, x: m.b(m.norm(m.a(x))) + m.norm(m.a(x))[:, 3:4], a=nn.Linear(5, 6), norm=nn.LayerNorm(6),
        b=nn.Linear(6, 1),
    )  # fmt: skip
    prunable = Prunable.of(model := of(module, torch.randn(4, 5)), shrinks=True)
    keep = prunable.keep_all()
    keep[prunable.groups[0].classes[:2]] = False
    with pytest.raises(CompressError, match="its code picks channels by number"):
        prunable.cut(model, keep)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(1, 6)], ids=lambda n: type(n).__name__)
def test_statistics_are_those_of_the_channels_left(norm: nn.Module) -> None:
    torch.manual_seed(0)
    module = Lambda(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(5, 6), norm=norm, b=nn.Linear(6, 1))
    model = of(module, torch.randn(4, 5))
    prunable = Prunable.of(model, shrinks=True)
    keep = prunable.keep_all()
    keep[prunable.groups[0].classes[[0, 4]]] = False
    left, network = [1, 2, 3, 5], over_what_is_left(prunable.network, prunable.channels, keep)
    x, (a, norm, b) = model.inputs[0], model.module.children()
    y = a(x)[:, left]
    mean = 0 if isinstance(norm, nn.RMSNorm) else y.mean(1, keepdim=True)
    eps = norm.eps or torch.finfo(y.dtype).eps
    z = (y - mean) / ((y - mean).pow(2).mean(1, keepdim=True) + eps).sqrt() * norm.weight[left]
    z = z + (0 if isinstance(norm, nn.RMSNorm) else norm.bias[left])
    torch.testing.assert_close(network(x)[0], z @ b.weight[:, left].T + b.bias)


def gated_by_number(m: Lambda, x: Tensor, *flags: Tensor) -> Tensor:
    y = m.a(x).relu()
    answer = m.b(y)
    gate = y[:, 3:4] if y.dim() == 2 else y[:, 3:4].mean((2, 3), keepdim=True)
    return answer if not flags else torch.where(flags[0] > 0, answer, answer * gate)


class TestChannelsPickedByNumber:
    """Code that the analysis cannot see through, where the example inputs do not tell."""

    def refused(self, module: nn.Module, *inputs: Tensor) -> None:
        model = of(module, *inputs, tasks=1)
        prunable = Prunable.of(model)
        keep = prunable.keep_all()
        keep[prunable.groups[0].classes[:2]] = False
        with pytest.raises(CompressError, match="its code picks channels by number"):
            prunable.cut(model, keep)

    def test_units_that_are_dead_for_the_example(self) -> None:
        torch.manual_seed(0)
        module = Lambda(lambda m, x: m.b(m.a(x).relu()) + m.a(x).relu()[:, 3:4], a=nn.Linear(5, 6), b=nn.Linear(6, 1))
        x = torch.ones(1, 5)
        with torch.no_grad():
            module.a.weight[2:] -= 2  # above 0 for no input but negative ones
        self.refused(module, x)

    def test_a_path_that_a_flag_leaves_out(self) -> None:
        torch.manual_seed(0)
        module = nn.Module()
        module.a, module.b = nn.Linear(5, 6), nn.Linear(6, 1)
        module.forward = partial(gated_by_number, module)  # type: ignore[method-assign]
        self.refused(module, torch.randn(4, 5), torch.ones(4, 1, dtype=torch.int64))

    def test_a_score_beside_coordinates(self) -> None:
        torch.manual_seed(0)
        module = Lambda(
            lambda m, x: torch.cat([640 * m.b(m.a(x)), (m.a(x)[:, 3:4] - 10).sigmoid()], 1), a=conv(3, 6), b=conv(6, 4)
        )
        self.refused(module, torch.randn(1, 3, 8, 8))


class Limited(nn.Module):
    """Two integers of the same value, one of which is a width."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.most = 8, 8
        self.a, self.b = nn.Linear(5, 16), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).split([self.inner, self.inner], 1)
        return self.b(first * second.sigmoid()).clamp(max=self.most)


def test_an_integer_that_is_a_width_by_chance_stays() -> None:
    torch.manual_seed(0)
    model = of(Limited(), torch.randn(3, 5), tasks=1)
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    keep[prunable.groups[0].classes[::2]] = False
    assert prunable.cut(model, keep).attributes == {"inner": 4}


class Taught(nn.Module):
    """An auxiliary head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = conv(3, 6), conv(6, 2), conv(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.a(x).relu()
        return (self.b(x), self.extra(x)) if self.training else (self.b(x),)


def test_a_cut_that_could_not_be_trained_is_refused() -> None:
    torch.manual_seed(0)
    model = of(Taught(), torch.randn(2, 3, 8, 8), tasks=1)
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    keep[prunable.groups[0].classes[0]] = False
    with pytest.raises(CompressError, match="In training the network's code fixes a size"):
        prunable.cut(model, keep)


def test_heads_are_replayed_with_their_attributes(tmp_path: Path) -> None:
    model = made("attention, sdpa")
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    keep[prunable.groups[1].classes[1:3]] = False
    cut = prunable.cut(model, keep)
    assert cut.attributes == {"mix.num_heads": 2, "mix.inner": 6} and model.attributes == {}
    assert cut.kept["mix.q.weight"][0] == [0, 1, 2, 9, 10, 11]
    again = Prunable.of(cut)
    keep = again.keep_all()
    keep[again.groups[1].classes[0]] = False
    once_more = again.cut(cut, keep)
    once_more.save(tmp_path)
    workload = SimpleNamespace(build=lambda: CONSTRUCTS["attention, sdpa"]()[0], tasks=cut.tasks)
    workload.example_inputs = lambda: cut.inputs
    loaded = MultiTaskModel.load(tmp_path, workload)  # type: ignore[arg-type]
    assert loaded.attributes == {"mix.num_heads": 1, "mix.inner": 3}
    assert torch.equal(loaded.answers(*cut.inputs)["t0"], once_more.answers(*cut.inputs)["t0"])


def test_a_record_names_integers_of_the_module() -> None:
    model = made("attention, sdpa")
    for name in ("mix.none", "mix.scale", "none.heads"):
        with pytest.raises(CompressError, match=f"has no integer '{name}'"):
            model.cut({}, {name: 3})


def test_the_devices_multiple_is_of_channels_not_of_heads() -> None:
    group = next(g for g in Prunable.of(made("attention, matmul")).groups if g.name == "mix.q")
    assert (group.span, group.step(6), group.step(16)) == (3, 2, 16)


def test_what_a_product_sums_over_is_worth_what_writes_it() -> None:
    """Without a weight that reads it, a key's channel would look worth nothing to criteria that go by readers."""
    model = made("one head")
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    keep[prunable.groups[1].classes[2]] = False
    before, after = model.clone(), model.clone()
    prunable.silence(after.module, keep)
    changed = {
        name for name, value in after.module.state_dict().items() if not value.equal(before.module.state_dict()[name])
    }
    assert changed == {"q.weight", "q.bias", "k.weight", "k.bias"}
    bench = SimpleNamespace(seed=0, calibration=lambda count: [Batch(model.inputs)])
    score_TC = CRITERIA["taylor"](model, prunable, bench, 1)  # type: ignore[arg-type]
    assert bool((score_TC[:, prunable.groups[1].classes] > 0).all())


def test_what_only_a_mean_reads_is_worth_what_writes_it() -> None:
    model = made("mean as a gate")
    prunable = Prunable.of(model, shrinks=True)
    bench = SimpleNamespace(seed=0, calibration=lambda count: [Batch(model.inputs)])
    score_TC = CRITERIA["taylor"](model, prunable, bench, 1)  # type: ignore[arg-type]
    assert bool((score_TC[:, next(g for g in prunable.groups if g.name == "gate").classes] > 0).all())


@pytest.mark.parametrize("name", REFUSED)
def test_what_code_fixes_is_refused(name: str) -> None:
    model = made(name)
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    keep[next(group for group in prunable.groups if group.name == REFUSED[name]).classes[0]] = False
    with pytest.raises(CompressError, match="code fixes a size that the cut changes"):
        prunable.cut(model, keep)
