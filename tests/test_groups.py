"""Removing channels equals zeroing the weights that read them, costs what was promised, and follows the true groups."""

from collections.abc import Callable

import pytest
import torch
import torch_pruning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.channels import FIXED
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.trace import trace
from tests.models import BLOCKS, LITERAL, Lambda, Spec, build, conv, of

EXACT = 1e-9


def some_kept(prunable: Prunable, random) -> Tensor:  # type: ignore[no-untyped-def]
    """A random choice that leaves each group a channel."""
    keep = prunable.keep_all()
    for group in prunable.groups:
        gone = random.sample(group.classes.tolist(), random.randint(0, len(group) - 1))
        keep[torch.tensor(gone, dtype=torch.int64)] = False
    return keep


def assert_removed_as_zeroed(model: MultiTaskModel, cut: MultiTaskModel, prunable: Prunable, keep: Tensor) -> None:
    zeroed = model.clone()
    with torch.no_grad():
        prunable.silence(zeroed.module, keep)
        inputs = tuple(x.double() for x in model.inputs)
        zeroed.module.double()
        small = cut.clone()
        small.module.double()
        wanted, given = zeroed.answers(*inputs), small.answers(*inputs)
    for task, answer in wanted.items():
        torch.testing.assert_close(given[task], answer, rtol=EXACT, atol=EXACT * float(answer.abs().max()))


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(sorted(set(BLOCKS) - {"cast"})), min_size=1, max_size=4),
    st.sampled_from(["dense", "flat", "pooled"]),
    st.randoms(use_true_random=False),
)
def test_removing_channels_equals_zeroing_them(blocks: list[str], form: str, random) -> None:  # type: ignore[no-untyped-def]
    model = build(Spec(tuple(blocks[1:]), ((blocks[0],), ()), form, batch=2))
    prunable = Prunable.of(model)
    keep = some_kept(prunable, random)
    try:
        cut = prunable.cut(model, keep)
    except CompressError:
        assert LITERAL & set(blocks)  # only code with numbers in it may fail, and then it says so
        return
    assert_removed_as_zeroed(model, cut, prunable, keep)
    macs, parameters = prunable.cost(keep)
    assert macs == count_macs(trace(cut))[0]
    assert parameters == sum(p.numel() for p in cut.module.parameters())


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda y: y.view(-1, 4, 2, 8, 8).flatten(1, 2), "fixes a size that the cut changes: shape"),
        (lambda y: y + y.select(1, 3)[:, None], "its code picks channels by number"),
    ],
)
def test_code_with_numbers_in_it_is_refused(run: Callable[[Tensor], Tensor], says: str) -> None:
    model = of(Lambda(lambda m, x: (m.b(run(m.a(x))),), a=conv(3, 8), b=conv(8, 2)), torch.randn(1, 3, 8, 8))
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    keep[prunable.groups[0].classes[:1]] = False
    with pytest.raises(CompressError, match=says):
        prunable.cut(model, keep)


def test_groups_are_named_after_their_first_layer_and_hold_no_answer() -> None:
    model = build(Spec(("residual", "concat", "depthwise"), (("squeeze_excite",), ())))
    prunable = Prunable.of(model)
    assert [(group.name, len(group)) for group in prunable.groups] == [
        ("stem", 8),
        ("trunk.0.a", 8),
        ("trunk.1.a", 4),
        ("trunk.1.b", 8),
        ("trunk.2.0", 6),
        ("trunk.2.3", 8),
        ("heads.0.blocks.0.a", 8),
        ("heads.0.blocks.0.b", 4),
    ]
    assert not any(bool((group.classes == FIXED).any()) for group in prunable.groups)


def test_channels_that_only_some_layers_share_are_groups_of_other_names() -> None:
    def run(m: Lambda, x: Tensor) -> tuple[Tensor]:
        x = m.a(x)
        return (m.c(torch.cat([x[:, :4] + m.b(x), x[:, 4:]], 1)),)

    prunable = Prunable.of(of(Lambda(run, a=conv(3, 9), b=conv(9, 4), c=conv(9, 2)), torch.randn(1, 3, 8, 8)))
    assert [(group.name, len(group)) for group in prunable.groups] == [("a+b", 4), ("a", 5)]


def test_tensors_with_two_names_count_once() -> None:
    model = build(Spec(("tied", "twice"), ((), ())))
    prunable = Prunable.of(model)
    macs, parameters = prunable.cost(prunable.keep_all())
    assert parameters == sum(p.numel() for p in model.module.parameters())
    assert macs == count_macs(trace(model))[0]


# --- the peer: torch-pruning's dependency graph


def peer_groups(model: MultiTaskModel) -> set[frozenset[tuple[str, int]]]:
    """(layer, output channel) sets that must go together, according to torch-pruning."""
    graph = torch_pruning.DependencyGraph().build_dependency(
        model.module, example_inputs=model.inputs[0], verbose=False, ignored_params=[]
    )
    names = {layer: name for name, layer in model.module.named_modules()}
    found = set()
    for layer, name in names.items():
        if not isinstance(layer, nn.Conv2d | nn.Linear) or name.startswith("answer"):
            continue
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        for channel in range(layer.weight.shape[0]):
            group = graph.get_pruning_group(layer, prune, idxs=[channel])
            found.add(
                frozenset(
                    (names[dep.target.module], index)
                    for dep, indices in group
                    for index in indices
                    if "out_channels" in dep.handler.__name__ and isinstance(dep.target.module, nn.Conv2d | nn.Linear)
                )
            )
    return found


def our_groups(model: MultiTaskModel) -> set[frozenset[tuple[str, int]]]:
    prunable = Prunable.of(model)
    members: dict[int, set[tuple[str, int]]] = {}
    for contraction in prunable.channels.contractions:
        for index, identity in enumerate(prunable.channels.axes[contraction.writes].tolist()):
            if identity != FIXED:
                members.setdefault(identity, set()).add((contraction.weight.removesuffix(".weight"), index))
    return {frozenset(channels) for channels in members.values()}


class Peer(nn.Module):
    """Residual sum, concatenation and depthwise convolution: where both analyses must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.a, self.b, self.c = conv(8, 6), conv(6, 8), conv(8, 4)
        self.depthwise, self.mix = conv(12, 12, groups=12), conv(12, 6, 1)
        self.answer1, self.answer2 = nn.Linear(6, 2), nn.Linear(6 * 64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = x + self.b(self.a(x).relu())
        x = torch.cat([self.c(x), x], 1)
        x = self.mix(self.depthwise(x)).relu()
        return self.answer1(x.mean((2, 3))), self.answer2(x.flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_torch_pruning_where_it_is_right() -> None:
    model = of(Peer(), torch.randn(1, 3, 8, 8), tasks=2)
    assert our_groups(model) == peer_groups(model)


class Permuted(nn.Module):
    """O-Net's permutation before the flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.answer = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.conv(x).relu().permute(0, 3, 2, 1).flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_is_right_where_torch_pruning_is_wrong() -> None:
    """The linear layer's inputs that read convolution channel 1 are every fourth one, not a run of 36."""
    model = of(Permuted(), torch.randn(1, 3, 8, 8))
    truth = list(range(1, 144, 4))
    layer = model.module.conv
    peer = torch_pruning.DependencyGraph().build_dependency(model.module, example_inputs=model.inputs[0])
    group = peer.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=[1])
    theirs = next(list(i) for dep, i in group if dep.target.module is model.module.answer)
    prunable = Prunable.of(model)
    identity = prunable.groups[0].classes[1]
    ours = [
        (c.reads, prunable.channels.axes[c.reads])
        for c in prunable.channels.contractions
        if c.weight == "answer.weight"
    ]
    assert (ours[0][1] == identity).nonzero().flatten().tolist() == truth
    assert theirs != truth
    keep = prunable.keep_all()
    keep[identity] = False
    assert_removed_as_zeroed(model, prunable.cut(model, keep), prunable, keep)
