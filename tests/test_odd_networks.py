"""Networks that users bring: code that views memory, odd ranks and types, cuts that take groups apart."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from plain import Plain, setup, task
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import compressor.stages.prune as prune_module
from compressor.bench import Bench, reestimate_batchnorm
from compressor.budgets import Budget, margins
from compressor.channels import FIXED
from compressor.criteria import CRITERIA
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.model import MultiTaskModel, load_checkpoint
from compressor.progress import Silent
from compressor.record import sizes_of
from compressor.report.schema import TaskResult
from compressor.stages.finetune import Finetune
from compressor.stages.prune import Prune
from compressor.stages.ticket import Ticket
from compressor.surgery import one_width, refused
from compressor.training import Training

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def finetune(**settings: object) -> Finetune:
    return Finetune(kind="finetune", **({"steps": 4} | settings))  # type: ignore[arg-type]


def prune(**settings: object) -> Prune:
    return Prune(kind="prune", **({"batches": 2, "rounds": 1, "round_to": 1} | settings))  # type: ignore[arg-type]


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))


class Viewing(nn.Module):
    """Counts on contiguous memory, as much code does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = max_pool2d(self.body(x).relu(), 2)
        return self.head(y.view(y.size(0), -1))


class Gridded(nn.Module):
    """Has a buffer of five dimensions, as some detectors do."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.register_buffer("grid", torch.rand(1, 1, 8, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu() * self.grid[..., 0])


@pytest.mark.parametrize("make", [Viewing, Gridded, dense])
def test_it_trains_whatever_memory_the_code_counts_on(make: type[nn.Module], tmp_path: Path) -> None:
    model, bench = setup(make, (IMAGE,), tmp_path)
    tuned = finetune().run(model, bench)
    before, after = model.module.state_dict(), tuned.module.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(value.is_contiguous() for value in after.values())


def test_dense_answers_are_scored_during_a_training_and_as_slices(tmp_path: Path) -> None:
    """torchmetrics views what it compares."""
    model, bench = setup(dense, (IMAGE,), tmp_path, task("a", (0, 2)), task("b", (2, 3)), a="100 %", b="100 %")
    assert set(bench.before) == {"a", "b"}
    tuned = finetune(check_every=2).run(model, bench)
    assert set(bench.scores(tuned)) == {"a", "b"}


def test_checks_do_with_weights_that_hooks_compute(tmp_path: Path) -> None:
    def make() -> nn.Module:
        with pytest.warns(FutureWarning):
            return nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1))

    model, bench = setup(make, (IMAGE,), tmp_path, t="100 %")
    tuned = finetune(check_every=2).run(model, bench)
    assert bench.scores(tuned)


def test_batch_norm_that_cannot_be_estimated_is_told(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)
        )

    model, bench = setup(make, (IMAGE,), tmp_path, batch_size=1)
    with pytest.raises(CompressError, match="Batch norm cannot be estimated on the calibrate split: Expected more"):
        reestimate_batchnorm(model.module, bench.calibration(2))
    with pytest.raises(CompressError, match="finetune: batch norm cannot be trained on so small a batch"):
        finetune().run(model, bench)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) * 0.5).softmax(3) @ v
        return self.o(y.transpose(1, 2).flatten(2))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=6), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )


@pytest.mark.parametrize(
    ("make", "example"), [(grouped, IMAGE), (Attention, torch.randn(1, 5, 16))], ids=["groups", "heads"]
)
def test_rounds_go_on_when_a_cut_takes_groups_apart(make: type[nn.Module], example: Tensor, tmp_path: Path) -> None:
    model, bench = setup(make, (example,), tmp_path)
    before = {group.name for group in Prunable.of(model).groups}
    found = prune(macs=0.12, rounds=4).run(model, bench)
    assert {group.name for group in Prunable.of(found).groups} != before
    assert sum(p.numel() for p in found.module.parameters()) < sum(p.numel() for p in model.module.parameters())


def plain_chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.ReLU(), nn.Conv2d(40, 2, 3))


def test_a_goal_in_multiply_adds_holds_where_the_latency_is_met_already(tmp_path: Path) -> None:
    model, bench = setup(plain_chain, (IMAGE,), tmp_path)
    bench.speed = lambda _: 0.5
    found = prune(macs=0.5, latency=0.9).run(model, bench)
    assert sizes_of(found)[0] <= 0.5 * sizes_of(model)[0]


def test_no_group_gets_narrower_than_it_may_however_often_it_is_cut(tmp_path: Path) -> None:
    model, bench = setup(plain_chain, (IMAGE,), tmp_path)
    speeds = iter([1.0, *[0.6] * 7, 0.9, 0.8, 0.7, 0.7])
    bench.speed = lambda _: next(speeds)
    found = prune(latency=0.2, keep_at_least=0.5).run(model, bench)
    widths = [len(layer.weight) for layer in found.module if isinstance(layer, nn.Conv2d)]
    assert min(widths[:2]) >= 20


@pytest.mark.parametrize("search", ["uniform", "value"])
def test_widths_are_multiples_at_their_least_too(search: str, tmp_path: Path) -> None:
    model, bench = setup(plain_chain, (IMAGE,), tmp_path)
    found = prune(macs=0.05, search=search, round_to=8, keep_at_least=0.3).run(model, bench)
    assert [len(layer.weight) for layer in found.module if isinstance(layer, nn.Conv2d)] == [16, 16, 2]


def test_a_budget_overspent_without_any_group_is_told(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))

    model, bench = setup(make, (IMAGE,), tmp_path, t=0.0)
    prune(macs=0.5).run(model, bench)
    assert bench.short and bench.notes


def test_channels_without_a_batch_norm_are_worth_the_largest_scale_of_one_channel(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 64, 1),
            nn.BatchNorm2d(64),
        )

    model, bench = setup(make, (IMAGE,), tmp_path)
    prunable = Prunable.of(model)
    score_TC = CRITERIA["batchnorm"](model, prunable, bench, 1)
    assert {float(value) for value in score_TC[0][torch.arange(score_TC.shape[1]) != FIXED]} == {1.0}


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "magnitude-group"])
def test_networks_in_double_precision_are_scored(criterion: str, tmp_path: Path) -> None:
    model, bench = setup(lambda: dense().double(), (IMAGE.double(),), tmp_path)
    prunable = Prunable.of(model)
    score_TC = CRITERIA[criterion](model, prunable, bench, 1)
    assert score_TC.dtype == torch.float32 and bool(score_TC.isfinite().all()) and float(score_TC.sum()) > 0


def test_weights_that_no_criterion_heeds_are_refused() -> None:
    with pytest.raises(ValueError, match="'magnitude' scores channels for no task alone; leave 'weights' out"):
        prune(macs=0.5, criterion="magnitude", weights={"a": 3.0})


def test_fits_that_do_not_answer_alike_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(model: MultiTaskModel, *given: object) -> tuple[MultiTaskModel, list[str]]:
        copy = model.clone()
        copy.module[0].weight.data.fill_(float("nan"))
        return copy, []

    model, bench = setup(plain_chain, (IMAGE,), tmp_path)
    monkeypatch.setattr(prune_module, "without", ruined)
    with pytest.raises(CompressError, match="because of its fitted layers; leave 'reconstruct' out"):
        prune(macs=0.5, reconstruct=True).run(model, bench)


class NonLocal(nn.Module):
    """Two widths in one integer, whose channels nothing else ties."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = 8
        self.a, self.w = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.q, self.k, self.v = (nn.Conv2d(12, 8, 1) for _ in range(3))
        self.b = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q, k, v = (layer(x).view(len(x), self.inner, -1) for layer in (self.q, self.k, self.v))
        y = (v @ (q.mT @ k).mT / 64).view(len(x), self.inner, *x.shape[2:])
        return self.b(x + self.w(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_widths_that_are_one_integer_are_cut_alike(criterion: str, tmp_path: Path) -> None:
    model, bench = setup(NonLocal, (IMAGE,), tmp_path)
    after = prune(macs=0.6, criterion=criterion, batches=1).run(model, bench)
    assert bench.notes == [] and sizes_of(after)[0] <= 0.6 * sizes_of(model)[0]
    assert len(after.module.q.weight) == len(after.module.v.weight) == after.module.inner < 8


class Heads(nn.Module):
    """The width of a head is that of the input over the number of heads; keys come from a layer of that width too."""

    def __init__(self, reduces: bool) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.norm, self.wide = nn.Linear(12, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 32)
        self.less, self.b = nn.Linear(32, 32) if reduces else nn.Identity(), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, count, width = x.shape
        y = self.norm(x)
        q = self.q(y).reshape(n, count, self.heads, width // self.heads).transpose(1, 2)
        kv = self.kv(self.less(y).reshape(n, count, width)).reshape(n, count, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT / 3).softmax(-1) @ v).transpose(1, 2).reshape(n, count, width)
        return self.b(self.wide(x + self.out(y)).relu().mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reduces", [False, True], ids=["heads", "and what reads the same width"])
def test_heads_whose_width_is_made_of_their_inputs_go_with_it(reduces: bool, tmp_path: Path) -> None:
    model, bench = setup(partial(Heads, reduces), (torch.randn(2, 5, 12),), tmp_path)
    after = prune(macs=0.6, batches=1, shrink_norms=True).run(model, bench)
    assert bench.notes == [] and sizes_of(after)[0] <= 0.6 * sizes_of(model)[0]
    module, width = after.module, 8 * after.module.heads
    assert len(module.stem.weight) == len(module.q.weight) == module.out.in_features == width < 32
    assert module.kv.in_features == width and len(module.kv.weight) == 2 * width


def test_only_what_must_go_together_is_tied(tmp_path: Path) -> None:
    model, _ = setup(partial(Heads, reduces=True), (torch.randn(2, 5, 12),), tmp_path)
    prunable = Prunable.of(model, shrinks=True)
    keep = prunable.keep_all()
    for group in prunable.groups:
        keep[group.classes[1::2]] = False
    wrong = refused(model, prunable, keep, prunable.groups)
    for names in (wrong, {"stem", "q"}):  # what it takes to go along may be in a group that can go by itself
        pairs = one_width(model, prunable, [group for group in prunable.groups if group.name in names], ())
        assert {axis.tensor for pair in pairs for axis in pair} == {"stem.weight", "q.weight", "less.weight"}


class Halved(nn.Module):
    """One layer whose halves are two groups, with one integer for both."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 6
        self.l, self.m, self.n = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.p, self.q = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        first, second = y.narrow(-1, 0, self.c), y.narrow(-1, self.c, self.c)
        return self.p(first + self.m(x)) + self.q(second + self.n(x))  # type: ignore[no-any-return]


def test_groups_of_one_layer_are_tied_once(tmp_path: Path) -> None:
    model, bench = setup(Halved, (IMAGE[0, 0],), tmp_path)
    prune(macs=0.5, criterion="random").run(model, bench)  # which ends
    assert all("fixes their size" in note or "stopped short" in note for note in bench.notes)


class Spare(nn.Module):
    """A second answer that is no task's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        return self.b(x), self.c(x)


def test_answers_of_no_task_that_hold_channels_are_named(tmp_path: Path) -> None:
    model, bench = setup(Spare, (IMAGE,), tmp_path)
    prune(macs=0.5).run(model, bench)
    assert bench.short
    assert "left whole, because the module's own code fixes their size: a." in bench.notes
    assert any(note.startswith("the network also returns 1, of which no task is made") for note in bench.notes)


class Gated(nn.Module):
    """Each channel's gate reads its neighbours' (ECA), so that all go or none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.b = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * self.e(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None])  # type: ignore[no-any-return]


def test_channels_that_would_have_to_go_at_once_are_named(tmp_path: Path) -> None:
    model, bench = setup(Gated, (IMAGE,), tmp_path)
    prune(macs=0.9).run(model, bench)
    assert "left whole, because all their channels would have to go at once: a." in bench.notes


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x + torch.randn_like(x))  # type: ignore[no-any-return]


def test_answers_that_hang_on_chance_are_refused() -> None:
    with pytest.raises(CompressError, match="Task 't' answers otherwise each time"):
        load_checkpoint(Plain(Drawn, (IMAGE,), (task(),)), None)


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_through_a_reentrant_checkpoint_are_refused(tmp_path: Path) -> None:
    model, bench = setup(Recomputed, (IMAGE,), tmp_path)
    with pytest.raises(CompressError, match="let it use use_reentrant=False, or choose criterion = 'magnitude'"):
        prune(macs=0.5).run(model, bench)


def test_a_pattern_that_leaves_nothing_to_prune_is_refused(tmp_path: Path) -> None:
    model, bench = setup(lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2)), (IMAGE,), tmp_path)
    stage = Ticket.model_validate({"kind": "ticket", "pattern": "4x1", "keep_ratio": 0.5, "train": {"steps": 0}})
    with pytest.raises(CompressError, match="no convolution and no linear layer to prune; pattern '4x1' is for rows"):
        stage.check(model, bench)


def test_patterns_leave_transposed_convolutions_whole_and_say_so(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1))

    model, bench = setup(make, (IMAGE,), tmp_path)
    found = Ticket(kind="ticket", pattern="2:4", rounds=1, train=Training(steps=0)).run(model, bench)
    assert "2.weight" not in found.masks and not found.masks["3.weight"].all()
    assert bench.notes[0] == "left whole, as '2:4' is for rows of outputs: 2.weight."


def test_the_smallest_layer_keeps_a_weight(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 4, 3))

    model, bench = setup(make, (IMAGE,), tmp_path)
    ticket = Ticket(kind="ticket", keep_ratio=0.3, scope="layer", rounds=1, train=Training(steps=0))
    assert int(ticket.run(model, bench).masks["1.weight"].sum()) == 1


def test_learnt_thresholds_are_those_of_the_end_of_their_training(tmp_path: Path) -> None:
    model, bench = setup(dense, (IMAGE,), tmp_path, t="100 %")
    how = Training(steps=12, check_every=3, stop_at_margin=0.0, weighting="margins")
    Ticket(kind="ticket", keep_ratio=0.3, saliency="learnt", rounds=1, train=how).run(model, bench)
    assert not any("thresholds" in note for note in bench.notes)


def _normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), norm(nn.Conv2d(8, 3, 1)))


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_computed_of_others_are_computed_once_and_can_be_cut(
    norm: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    workload = Plain(partial(_normed, norm), (IMAGE,), (task(),))
    brought = workload.build().eval()
    save_file(brought.state_dict(), tmp_path / "brought.safetensors")
    model = load_checkpoint(workload, tmp_path / "brought.safetensors")
    assert torch.allclose(model.module(IMAGE), brought(IMAGE), atol=1e-6)
    assert sorted(dict(model.module.named_parameters())) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    bench = Bench(workload, model, {}, 1, 0, Silent(), directory=tmp_path)
    found = prune(macs=0.6).run(model, bench)
    found.save(tmp_path)
    again = MultiTaskModel.load(tmp_path, workload)
    assert again.module[0].weight.shape[0] < 8  # type: ignore[index, union-attr]
    assert torch.equal(again.module(IMAGE), found.module(IMAGE))


class Embedding(nn.Module):
    """A table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((3 * x[:, :, 0, 0].abs()).long().clamp(0, 9)).mean(1))


def test_sparse_gradients_are_trained_on(tmp_path: Path) -> None:
    model, bench = setup(Embedding, (IMAGE,), tmp_path)
    found = finetune(learning_rate=1e-2).run(model, bench)
    assert not torch.equal(found.module.table.weight, model.module.table.weight)  # type: ignore[union-attr]


def test_complex_weights_are_refused(tmp_path: Path) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.ones(3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.mix[:, None, None]).abs()

    with pytest.raises(CompressError, match=r"Complex weights can be neither pruned.*: mix"):
        load_checkpoint(Plain(Spectral, (IMAGE,), (task(),)), None)


def test_a_component_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    model, bench = setup(dense, (IMAGE,), tmp_path)
    ticket = Ticket(kind="ticket", keep={"tt": 0.5}, rounds=1, train=Training(steps=0))
    with pytest.raises(CompressError, match=r"no component 'tt' has weights\. Did you mean 't'"):
        ticket.check(model, bench)


@pytest.mark.parametrize("samples", [100, 200, 1000])
@pytest.mark.parametrize("points", [1, 2, 5])
def test_a_drop_of_exactly_the_budget_is_inside_it(samples: int, points: int) -> None:
    t, budget = task(), Budget.parse(points / 100)
    lost = points * samples // 100
    for wrong in range(1, samples - lost):
        before, after = (float(torch.tensor(k / samples)) for k in (wrong, wrong + lost))  # an error, in float32
        assert margins((t,), {"t": budget}, {"t": before}, {"t": after})["t"] >= 0
        told = TaskResult.of("t", "mae", higher_is_better=False, before=before, after=after, budget=points / 100,
                             budget_text="", split="validate", split_sha256="0" * 64)  # fmt: skip
        assert told.within_budget
    assert margins((t,), {"t": budget}, {"t": 0.5}, {"t": 0.5 + points / 100 + 1e-4})["t"] < 0
