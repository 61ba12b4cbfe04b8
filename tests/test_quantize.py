"""Quantization: grids, what lies on them, and that every form of a quantized network answers alike."""

from math import frexp
from pathlib import Path

import networks
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from plain import setup
from torch import Tensor, nn

from compressor.bench import Bench
from compressor.budgets import Budget
from compressor.errors import CompressError
from compressor.export import run, session, to_program
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from compressor.quantization.calibrate import grids, seen
from compressor.quantization.grids import SCALE_BITS, Grid
from compressor.quantization.points import points
from compressor.quantization.ranges import Histogram, weight_scales
from compressor.quantization.simulate import computed, folded
from compressor.recipe import load
from compressor.stages.finetune import Finetune
from compressor.stages.prune import Prune
from compressor.stages.quantize import Quantize
from compressor.stages.ticket import Ticket
from compressor.trace import trace
from compressor.training import Training
from compressor.verify import climb
from compressor.workload import Task
from targets.lower import reference


def quantize(**settings: object) -> Quantize:
    return Quantize(kind="quantize", **settings)  # type: ignore[arg-type]


def of(module: nn.Module, *inputs: Tensor) -> MultiTaskModel:
    return MultiTaskModel(module.eval(), (Task("t"),), inputs)


# --- grids and ranges


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.booleans())
def test_a_grid_spans_what_it_is_asked_to_and_has_zero(a: float, b: float, exact: bool) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    grid = Grid.spanning(min(a, b), max(a, b), exact=exact)
    assert not exact or frexp(grid.scale)[0] == 0.5
    assert grid.scale <= (1.01 + exact) * max((high - low) / 255, 2.0**-40) or not (high - low) / 255
    assert -128 <= grid.zero_point <= 127
    assert grid.low <= low + grid.scale and grid.high >= high - grid.scale
    assert (0 - grid.zero_point + grid.zero_point) * grid.scale == 0.0


def test_a_histogram_says_the_same_however_its_values_come() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    whole, parts = Histogram(), Histogram()
    whole.add(values)
    for part in values.sort().values.split(37):  # ever larger at one end
        parts.add(part)
    for rule in ("minmax", "percentile", "mse"):
        one, other = whole.grid(rule, 99.0), parts.grid(rule, 99.0)  # type: ignore[arg-type]
        assert one.scale == pytest.approx(other.scale, rel=0.05)


def test_rules_cut_outliers_off_and_minmax_does_not() -> None:
    values = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0, -100])])
    seen = Histogram()
    seen.add(values)
    assert seen.grid("minmax", 0).high >= 99
    assert seen.grid("percentile", 99.9).high < 10
    errors = {}
    for rule in ("minmax", "mse"):
        grid = seen.grid(rule, 0)  # type: ignore[arg-type]
        rounded = torch.fake_quantize_per_tensor_affine(values, grid.scale, grid.zero_point, -128, 127)
        errors[rule] = float((values - rounded).square().mean())
    assert errors["mse"] < errors["minmax"]


def test_weight_scales_are_by_channel_and_never_zero() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    scales = weight_scales(weight, 0, "minmax")
    assert torch.allclose(scales[[0, 1, 3]] * 127, weight[[0, 1, 3]].abs().amax((1, 2, 3)))
    assert float(scales[2]) > 0
    assert weight_scales(weight, None, "minmax").shape == (1,)
    best = weight_scales(weight, 0, "mse")[:, None, None, None]
    plain = scales[:, None, None, None]
    error = [float((weight - (weight / s).round().clamp(-127, 127) * s).square().sum()) for s in (best, plain)]
    assert error[0] <= error[1]


def test_exact_weight_scales_are_short_and_no_more_than_a_sixteenth_wider() -> None:
    weight = torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for rule in ("minmax", "mse"):
        scales, plain = (weight_scales(weight, 0, rule, exact=exact) for exact in (True, False))  # type: ignore[arg-type]
        assert all(float(scale).as_integer_ratio()[0] < 2**SCALE_BITS for scale in scales)
        if rule == "minmax":
            assert (scales >= plain).all() and (scales <= plain * (1 + 2.0 ** (1 - SCALE_BITS))).all()


def test_what_is_infinite_gets_no_grid() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) + self.mask).softmax(-1))

    model = of(Masked(), torch.rand(1, 4))
    network = folded(trace(model))
    where = points(network)
    assert "add" in where.values
    histograms = seen(lambda _: network, where.values, [model.inputs])
    found = grids(computed(network), where, histograms, ("mse", "mse"), 0, exact=True)
    assert set(where.values) - set(found.values) == {"add"}
    model.quantization = found
    answer = model.answers(*model.inputs)["t"]
    assert answer.isfinite().all() and torch.allclose(answer, network(*model.inputs)[0], atol=0.05)


# --- what is put on grids


def test_folding_batch_norms_changes_no_answer_and_leaves_none(model: MultiTaskModel) -> None:
    network = trace(model)
    without = folded(network)
    assert not any("batch_norm" in node.name for node in without.graph.nodes)
    for one, other in zip(network(*model.inputs), without(*model.inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_batch_norm_whose_input_others_read_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.norm(x)

    network = folded(trace(of(Net(), torch.rand(1, 1, 8, 8))))
    assert [node.name for node in network.graph.nodes if "batch_norm" in node.name] == ["batch_norm"]


def test_activations_are_rounded_after_what_they_end_in_and_float_layers_are_left() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.max_pool2d(torch.relu(self.a(x)), 2)
            return self.c(torch.sigmoid(self.b(x)).mean((2, 3)))

    network = folded(trace(of(Net(), torch.rand(1, 1, 12, 12))))
    everything = points(network)
    assert everything.layers == everything.weighted == ("conv2d", "conv2d_1", "linear")
    assert everything.values == ("inputs_0", "relu", "conv2d_1", "mean", "linear")
    assert points(network, answers=[0]).values == ("inputs_0", "relu", "conv2d_1", "mean")
    assert points(network, whole=["conv2d_1"]).weighted == ("conv2d", "linear")
    assert "conv2d_1" not in points(network, whole=["conv2d_1"]).values


# --- the stage


def test_a_quantized_network_keeps_its_budgets_and_is_on_its_grids(model: MultiTaskModel, tmp_path: Path) -> None:
    bench = tiny.bench(model, tmp_path, kind=0.02, size=0.01, mask=0.02)
    found = quantize().run(model, bench)
    assert model.quantization is None and found.quantization is not None
    assert min(bench.margins(bench.scores(found)).values()) >= 0
    network = trace(found)
    for node in network.graph.nodes:
        if node.name in found.quantization.scales:
            scale = found.quantization.scales[node.name]
            held = dict(network.named_buffers()) | dict(network.named_parameters())
            weight = held[str(node.args[1].target)]
            steps = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
            assert torch.allclose(steps, steps.round(), atol=1e-3) and float(steps.abs().max()) <= 127.001


def test_it_answers_alike_in_batches_and_one_by_one(model: MultiTaskModel, bench: Bench) -> None:
    found = quantize().run(model, bench)
    images = bench.validation[0].inputs[0][:4]
    with torch.no_grad():
        together = found.answers(images)
        alone = [found.answers(image[None]) for image in images]
    for task in together:
        assert torch.allclose(together[task], torch.cat([one[task] for one in alone]), atol=1e-4)


class Wide(nn.Module):
    """Convolutions that a processor would transform, strides, a residual chain, poolings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, 2, 1)
        self.first, self.second = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down(torch.relu(self.stem(x))))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def test_exact_grids_answer_alike_to_the_bit_in_every_form(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model, bench = setup(Wide, (image,), tmp_path)
    found = quantize(batches=2, steps="exact", most_kept=0.0).run(model, bench)
    _, program = to_program(extract(found, ("t",)), found.inputs)
    device = networks.cpu_device(bits=networks.host_bits())
    for seed in range(4):
        x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            wanted = found.answers(x)["t"].numpy()
        for answer in (networks.answers, lambda p, x: networks.run_built(p, device, x)):
            assert np.array_equal(answer(program, x.numpy())["t"], wanted)


def test_steps_are_exact_unless_that_costs_a_budget(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model, bench = setup(Wide, (image,), tmp_path)
    plain = quantize(batches=2, most_kept=0.0, equalise="never")
    lost = {}
    for steps in ("exact", "any"):
        found = plain.model_copy(update={"steps": steps}).run(model, bench)
        lost[steps] = bench.scores(found)["t"] - bench.before["t"]
    assert lost["any"] < lost["exact"], "or this network tells nothing"
    for budget, exact in ((2 * lost["exact"], True), ((lost["exact"] + lost["any"]) / 2, False)):
        bench.budgets, bench.notes = {"t": Budget.parse(budget)}, []
        found = plain.run(model, bench)
        assert found.quantization is not None
        assert all(frexp(grid.scale)[0] == 0.5 for grid in found.quantization.values.values()) == exact
        assert any("powers of two a task left its budget" in note for note in bench.notes) != exact


@pytest.mark.parametrize("tasks", [("kind",), ("mask",), ("kind", "size", "mask")])
def test_every_form_of_a_quantized_pathway_answers_alike(
    model: MultiTaskModel, bench: Bench, tasks: tuple[str, ...]
) -> None:
    found = quantize().run(model, bench)
    pathway = extract(found, tasks)
    exported, simplified = to_program(pathway, found.inputs)
    inputs = [(image[None],) for image in bench.validation[0].inputs[0][:3]]
    climbed = climb(found, pathway, (exported, simplified), inputs, reference, reference, None)
    assert {row.rung for row in climbed} == {"pathway", "onnx", "onnxsim", "relax"} and all(r.holds for r in climbed)
    by_onnx = run(session(simplified.model, optimised=False), (inputs[0][0].numpy(),))
    with torch.no_grad():
        eager = found.answers(*inputs[0])
    for task in tasks:
        assert np.allclose(by_onnx[task], eager[task].numpy(), atol=1e-5)


def test_weights_and_biases_are_integers_in_onnx(model: MultiTaskModel, bench: Bench) -> None:
    found = quantize().run(model, bench)
    _, program = to_program(extract(found, ("kind", "size", "mask")), found.inputs)
    held = {one.name: numpy_helper.to_array(one) for one in program.model.graph.initializer}
    makers = {out: node for node in program.model.graph.node for out in node.output}
    layers = [node for node in program.model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == 7
    for layer in layers:
        kinds = [held[makers[name].input[0]].dtype for name in layer.input[1:]]
        assert kinds == [np.int8, np.int32], layer.name
    assert not any(array.dtype == np.float32 and array.ndim > 1 for array in held.values())


def test_a_layer_of_zeros_is_exported_as_one(tmp_path: Path) -> None:
    model = of(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.rand(1, 6))
    nn.init.zeros_(model.module[2].weight)  # type: ignore[index, arg-type]
    found = model.clone()
    network = folded(trace(model))
    where = points(network)
    found.quantization = grids(
        computed(network), where, seen(lambda _: network, where.values, [model.inputs]), ("mse", "mse"), 0, exact=True
    )
    _, program = to_program(extract(found, ("t",)), found.inputs)
    answer = run(session(program.model), tuple(x.numpy() for x in model.inputs))["t"]
    assert np.allclose(answer, model.answers(*model.inputs)["t"].detach().numpy(), atol=0.01)


def test_after_pruning_and_a_ticket_zeros_stay_zeros(model: MultiTaskModel, bench: Bench) -> None:
    smaller = Prune(kind="prune", macs=0.6, rounds=1, round_to=4, batches=2, slack=1e3).run(model, bench)
    sparse = Ticket(kind="ticket", keep_ratio=0.4, rounds=1, train=Training(steps=8), slack=1e3).run(smaller, bench)
    found = quantize(slack=1e3).run(sparse, bench)
    network, masks = trace(found), found.masks
    held = dict(network.named_buffers()) | dict(network.named_parameters())
    assert masks and all((held[name][~mask] == 0).all() for name, mask in masks.items())
    pathway = extract(found, ("mask",))
    assert pathway.effective_macs < pathway.macs


def test_fine_tuning_after_it_trains_through_the_grids(model: MultiTaskModel, bench: Bench) -> None:
    found = quantize(keep=(), ranges="minmax", correct_bias=False, slack=1e3).run(model, bench)
    before = {name: value.clone() for name, value in found.module.state_dict().items()}
    tuned = Finetune(kind="finetune", steps=8, learning_rate=1e-3, precision="bf16", ema=0.5).run(found, bench)
    assert tuned.quantization == found.quantization
    after = tuned.module.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)


def test_it_is_saved_and_loaded(model: MultiTaskModel, bench: Bench, tmp_path: Path) -> None:
    found = quantize().run(model, bench)
    (tmp_path / "q").mkdir()
    found.save(tmp_path / "q")
    loaded = MultiTaskModel.load(tmp_path / "q", tiny.Tiny())
    with torch.no_grad():
        for task, answer in found.answers(*found.inputs).items():
            assert torch.equal(answer, loaded.answers(*found.inputs)[task])
    (tmp_path / "q" / "quantization.json").write_text('{"schema": "other"}')
    with pytest.raises(CompressError, match="has the schema 'other'"):
        MultiTaskModel.load(tmp_path / "q", tiny.Tiny())


def test_layers_stay_in_floating_point_when_asked(model: MultiTaskModel, bench: Bench) -> None:
    found = quantize(keep=("mask", "fused")).run(model, bench)
    _, program = to_program(extract(found, ("mask",)), found.inputs)
    dtypes = {one.name: numpy_helper.to_array(one).dtype for one in program.model.graph.initializer}
    assert dtypes["mask.0.weight"] == np.float32 and dtypes["down.0.weight.integers"] == np.int8
    with pytest.raises(CompressError, match=r"no layer 'fusde'\. Did you mean 'fused'\?"):
        quantize(keep=("fusde",)).run(model, bench)


def test_a_budget_keeps_the_layers_that_win_most_in_floating_point(model: MultiTaskModel, tmp_path: Path) -> None:
    """Answers on 256 steps cost the size more than it may; its head is what helps."""
    bench = tiny.bench(model, tmp_path, size=0.0, kind=1.0, mask=1.0)
    whole = quantize(answers="int8", steps="any", most_kept=0).run(model, bench)
    assert bench.short and min(bench.margins(bench.scores(whole)).values()) < 0
    bench.notes.clear()
    found = quantize(answers="int8", steps="any", most_kept=1.0).run(model, bench)
    assert bench.margins(bench.scores(found))["size"] > bench.margins(bench.scores(whole))["size"]
    assert bench.notes[0] == "10 values and 7 weights lie on grids, from 4 batches of the calibrate split."
    assert bench.notes[1].startswith("of its budget the worst task wins back most where these stay in floating point:")
    assert bench.notes[2].startswith("left in floating point, ")


def test_what_cannot_be_quantized_is_refused(model: MultiTaskModel, bench: Bench) -> None:
    found = quantize().run(model, bench)
    with pytest.raises(CompressError, match="quantized already"):
        quantize().run(found, bench)
    with pytest.raises(CompressError, match="put 'quantize' after the stages that cut"):
        found.cut({})


def test_a_network_that_works_otherwise_with_another_batch_is_refused(model: MultiTaskModel, bench: Bench) -> None:
    class Net(tiny.TinyNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = super().forward(x)
            return found if len(x) > 1 else found | {"fused": found["fused"] + self.fused(x.mean() * torch.ones(1, 32))}

    odd = MultiTaskModel(Net().eval(), model.tasks, model.inputs)
    odd.module.load_state_dict(model.module.state_dict())
    with pytest.raises(CompressError, match="only networks whose code is the same for every batch size"):
        quantize().run(odd, bench)


def test_a_recipe_puts_it_after_all_that_cuts(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[workload]\nfactory = "w.py:W"\n[[stages]]\nkind = "quantize"\n[[stages]]\nkind = "finetune"\nsteps = 1\n'
        '[[stages]]\nkind = "prune"\nmacs = 0.5\n'
    )
    with pytest.raises(CompressError, match=r"Stage 3 \(prune\): after 'quantize' nothing can be cut"):
        load(recipe)
