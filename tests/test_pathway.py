"""An exact pathway answers as the whole network does, and reads nothing that its tasks do not need."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.equivalence import in_double
from compressor.errors import CompressError
from compressor.graph import tensor_of
from compressor.groups import Prunable
from compressor.inspection import Row, inspect
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.pathway import Pathway, extract
from compressor.trace import trace
from compressor.workload import Task
from tests.models import BLOCKS, Lambda, Spec, build, conv, of, scrambled

EXACT = 1e-9

names = st.sampled_from(sorted(BLOCKS))
specs = st.builds(
    Spec,
    trunk=st.lists(names, max_size=3).map(tuple),
    heads=st.lists(st.lists(names, max_size=2).map(tuple), min_size=2, max_size=3).map(tuple),
    form=st.sampled_from(["dense", "flat", "pooled"]),
    output=st.sampled_from(["dict", "list", "tuple", "tensor", "nested"]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 100),
)


def assert_answers_as_the_whole(pathway: Pathway, model: MultiTaskModel) -> None:
    inputs = tuple(x.double() if x.is_floating_point() else x for x in model.inputs)
    whole = model.clone()
    whole.module.double()
    with torch.no_grad():
        wanted = {task: answer.detach() for task, answer in whole.answers(*inputs).items()}
        given = in_double(pathway.network)(*inputs)
    for task, answer in zip(pathway.tasks, given, strict=True):
        torch.testing.assert_close(answer, wanted[task], rtol=EXACT, atol=EXACT * float(wanted[task].abs().max()))


@pytest.mark.parametrize("block", sorted(set(BLOCKS) - {"cast"}))
def test_every_block_alone(block: str) -> None:
    model = build(Spec(trunk=(), heads=(("conv_bn_relu",), (block,))))
    pathway = extract(model, ["t1"])
    assert_answers_as_the_whole(pathway, model)
    assert not [name for name in pathway.tensors if name.startswith("heads.0")]
    assert not [name for name in extract(model, ["t0"]).tensors if name.startswith("heads.1")]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(specs, st.data())
def test_any_task_set_of_any_network(spec: Spec, data: st.DataObject) -> None:
    model = build(spec)
    every = [task.name for task in model.tasks]
    tasks = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    pathway = extract(model, tasks)
    if "cast" not in {*spec.trunk, *sum(spec.heads, ())}:
        assert_answers_as_the_whole(pathway, model)
    if spec.output == "tensor":
        assert pathway.tensors["answer.weight"].shape[0] == 2 * len(tasks)
    elif spec.output != "nested":
        others = [f"heads.{every.index(task)}." for task in every if task not in tasks]
        assert not [name for name in pathway.tensors if name.startswith(tuple(others))]
    assert pathway.macs <= count_macs(trace(model))[0]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(specs, st.randoms(use_true_random=False))
def test_channels_read_only_through_zeros_disappear(spec: Spec, random) -> None:  # type: ignore[no-untyped-def]
    model = build(spec)
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    for group in prunable.groups:
        for identity in random.sample(group.classes.tolist(), len(group) // 2):
            keep[identity] = False
    zero_reads(model, prunable, keep)
    pathway = extract(model, [task.name for task in model.tasks])
    if "cast" not in {*spec.trunk, *sum(spec.heads, ())}:
        assert_answers_as_the_whole(pathway, model)
    assert pathway.macs <= prunable.cost(prunable.keep_all())[0]


def zero_reads(model: MultiTaskModel, prunable: Prunable, keep: Tensor) -> None:
    with torch.no_grad():
        for axis in prunable.reads():
            gone = (~keep[prunable.channels.axes[axis]]).nonzero().flatten()
            tensor_of(model.module, axis.tensor).index_fill_(axis.dim, gone, 0.0)


def test_masked_channels_are_gone_to_the_last_one() -> None:
    model = build(Spec(("conv_bn_relu", "residual", "concat"), (("depthwise",), ("transposed",))))
    prunable = Prunable.of(model)
    keep = prunable.keep_all()
    for group in prunable.groups:
        keep[group.classes[: len(group) // 2]] = False
    zero_reads(model, prunable, keep)
    pathway = extract(model, ["t0", "t1"])
    macs, parameters = prunable.cost(keep)
    assert (pathway.macs, pathway.parameters(model)) == (macs, parameters)


def test_an_unread_layer_keeps_one_channel_to_read() -> None:
    module = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 2))
    model = of(module, torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        module[2].weight.zero_()
    model.tasks = (Task("t0"),)
    pathway = extract(model, ["t0"])
    assert pathway.tensors["2.weight"].shape == (2, 1, 3, 3)
    assert_answers_as_the_whole(pathway, model)


def test_what_no_operator_can_express_stays() -> None:
    """Every other channel is taken by number; of an uneven rest that would be no slice, of an even one it is."""

    class Alternate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 12), conv(6, 2), conv(12, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.a(x).relu()
            return self.b(x[:, ::2]), self.c(x)

    for gone, left in ([0, 2], 10), ([2, 6], 12):
        model = of(Alternate(), torch.randn(1, 3, 8, 8), tasks=2)
        with torch.no_grad():
            model.module.b.weight[:, [index // 2 for index in gone]] = 0
            model.module.c.weight[:, gone] = 0
        pathway = extract(model, ["t0", "t1"])
        assert pathway.tensors["a.weight"].shape[0] == left
        assert_answers_as_the_whole(pathway, model)
        alone = extract(model, ["t0"])
        assert_answers_as_the_whole(alone, model)


def test_a_concatenated_branch_that_only_zeros_read_goes_whole() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = conv(3, 4), conv(3, 6), conv(10, 2)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.out(torch.cat([self.a(x), self.b(x)], 1)),)

    model = of(Branches(), torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        model.module.out.weight[:, 4:] = 0
    pathway = extract(model, ["t0"])
    assert_answers_as_the_whole(pathway, model)
    assert set(pathway.tensors) == {"a.weight", "a.bias", "out.weight", "out.bias"}


class Fused(nn.Module):
    """Two tasks in one linear layer after PReLU, permutation and flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.slope, self.fc = nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.slope(self.conv(x)).permute(0, 3, 2, 1).flatten(1))


def test_rows_of_other_tasks_go_from_a_fused_layer() -> None:
    model = scrambled(
        MultiTaskModel(
            Fused().eval(), (Task("a", channels=(0, 2)), Task("b", channels=(2, 5))), (torch.randn(2, 3, 8, 8),)
        )
    )
    with torch.no_grad():  # channel 4 is read by task a alone
        model.module.fc.weight.view(5, 6, 6, 6)[2:, :, :, 4] = 0
    both, first, second = (extract(model, tasks) for tasks in (["a", "b"], ["a"], ["b"]))
    assert first.tensors["fc.weight"].shape == (2, 216)
    assert second.tensors["fc.weight"].shape == (3, 180)
    assert second.kept["conv.weight"][0] == (0, 1, 2, 3, 5)
    for pathway in (both, first, second):
        assert_answers_as_the_whole(pathway, model)
    swapped = extract(model, ["b", "a"])
    assert swapped.name == "b+a"
    assert_answers_as_the_whole(swapped, model)


@pytest.mark.parametrize("answer", ["same", "input", "slice of the input", "constant", "stage of the other"])
def test_answers_that_are_unusual(answer: str) -> None:
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.held = conv(3, 4), conv(4, 2), nn.Parameter(torch.randn(1, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.a(x)
            first = self.b(features.relu())
            others = {
                "same": first,
                "input": x,
                "slice of the input": x[:, 1:],
                "constant": self.held,
                "stage of the other": features,
            }
            return first, others[answer]

    model = of(Unusual(), torch.randn(1, 3, 8, 8), tasks=2)
    for tasks in (["t0"], ["t1"], ["t0", "t1"]):
        assert_answers_as_the_whole(extract(model, tasks), model)
    if answer != "same":
        assert "b.weight" not in extract(model, ["t1"]).tensors


def test_several_inputs_and_token_numbers() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.image, self.a, self.b = nn.Embedding(10, 6), conv(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            words = self.words(tokens).mean(1)
            return self.a(words.relu() * self.image(x).mean((2, 3))), self.b(words)

    model = of(TwoInputs(), torch.randn(2, 3, 8, 8), torch.randint(0, 10, (2, 5)), tasks=2)
    for tasks in (["t0"], ["t1"]):
        assert_answers_as_the_whole(extract(model, tasks), model)
    assert "image.weight" not in extract(model, ["t1"]).tensors
    with torch.no_grad():
        model.module.a.weight[:, :2] = 0
    assert extract(model, ["t0"]).tensors["words.weight"].shape == (10, 4)


def test_half_precision_inside_is_compared_in_float64() -> None:
    def run(m: Lambda, x: Tensor) -> tuple[Tensor, Tensor]:
        half = m.a(x).bfloat16().relu().float()
        return m.b(half), m.c(half)  # type: ignore[operator]

    model = of(Lambda(run, a=conv(3, 8), b=conv(8, 2), c=conv(8, 2)), torch.randn(1, 3, 8, 8), tasks=2)
    with torch.no_grad():
        model.module.b.weight[:, 2:6] = 0
    pathway = extract(model, ["t0"])
    assert pathway.tensors["a.weight"].shape[0] == 4
    assert pathway.error <= EXACT


def test_task_sets_that_are_none() -> None:
    model = build(Spec((), ((), ())))
    with pytest.raises(CompressError, match=r"^No task 'depth'\. Tasks: t0, t1\.$"):
        extract(model, ["t0", "depth"])
    with pytest.raises(CompressError, match=r"each once; given: t0, t0\.$"):
        extract(model, ["t0", "t0"])
    with pytest.raises(CompressError, match=r"each once; given: none\.$"):
        extract(model, [])


def test_inspect_tells_shared_from_private() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(self.trunk(x)), self.b(self.trunk(x))

    model = of(Net(), torch.randn(1, 3, 2, 2), tasks=2)
    with torch.no_grad():
        model.module.a.weight[:, 0] = 0  # the first channel is task t1's own
    rows = inspect(model, [("t0",), ("t1",), ("t0", "t1")])
    assert rows == [
        Row(("t0",), macs=4 * (9 + 6), parameters=9 + 8, shared=9),
        Row(("t1",), macs=4 * (12 + 20), parameters=12 + 25, shared=9),
        Row(("t0", "t1"), macs=4 * (2 * 12 + 8 + 20), parameters=12 + 10 + 25, shared=9),
    ]
    assert rows[1].private == 28
