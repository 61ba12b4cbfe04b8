"""What every importance criterion keeps."""

from pathlib import Path

import pytest
import tiny
import torch

from compressor.bench import Bench
from compressor.criteria import BY_TASK, CRITERIA
from compressor.errors import CompressError
from compressor.groups import Prunable
from compressor.model import MultiTaskModel


@pytest.mark.parametrize("name", CRITERIA)
class TestCriterion:
    def score(self, name: str, model: MultiTaskModel, folder: Path) -> torch.Tensor:
        return CRITERIA[name](model, Prunable.of(model), tiny.bench(model, folder), 2)

    def test_is_a_row_a_task_of_finite_values_not_below_zero(self, name: str, tmp_path: Path) -> None:
        model = tiny.model()
        found = self.score(name, model, tmp_path)
        assert found.shape == (3, Prunable.of(model).class_count) and found.dtype == torch.float32
        assert bool(found.isfinite().all()) and bool((found >= 0).all())
        assert bool((found.sum(1) > 0).all()), "every task needs something"

    def test_is_known_to_tell_tasks_apart_or_not(self, name: str, tmp_path: Path) -> None:
        found = self.score(name, tiny.model(), tmp_path)
        assert bool((found == found[0]).all()) == (name not in BY_TASK)

    def test_repeats_itself_and_leaves_the_model_alone(self, name: str, tmp_path: Path) -> None:
        model = tiny.model()
        before = {key: value.clone() for key, value in model.module.state_dict().items()}
        first, second = (self.score(name, model, tmp_path) for _ in range(2))
        assert torch.equal(first, second)
        assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
        assert all(parameter.grad is None for parameter in model.module.parameters())
        assert not model.module.training

    def test_a_channel_that_does_nothing_is_worth_least(self, name: str, tmp_path: Path) -> None:
        model = tiny.model()
        with torch.no_grad():  # written and read by zeros
            for tensor in (model.module.stem[0].weight, model.module.stem[1].weight, model.module.stem[1].bias):
                tensor[3] = 0
            model.module.down[0].weight[:, 3] = 0
        group = next(g for g in Prunable.of(model).groups if g.name == "stem.0")
        found = self.score(name, model, tmp_path)[:, group.classes]
        assert bool((found[:, 3] == 0).all())
        assert bool((found[:, :3].sum(1) > 0).all())

    def test_frozen_weights_are_scored_too(self, name: str, tmp_path: Path) -> None:
        model = tiny.model()
        wanted = self.score(name, model, tmp_path)
        model.module.requires_grad_(False)
        assert torch.equal(self.score(name, model, tmp_path), wanted)
        assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_taylor_tells_tasks_apart(tmp_path: Path) -> None:
    """The mask head's own channels are worth nothing to the other tasks, which magnitude cannot know."""
    model = tiny.model()
    prunable = Prunable.of(model)
    own = next(group for group in prunable.groups if group.name == "mask.0").classes
    found = CRITERIA["taylor"](model, prunable, tiny.bench(model, tmp_path), 2)[:, own]
    assert float(found[:2].sum()) == 0 and float(found[2].sum()) > 0


def test_taylor_needs_a_gradient(tmp_path: Path) -> None:
    class Decided(tiny.Tiny):
        def losses(self, outputs, batch):  # type: ignore[no-untyped-def]
            return {name: loss.detach() for name, loss in super().losses(outputs, batch).items()}

    model = tiny.model()
    bench = Bench(Decided(), model, {}, 4, 0, tiny.Silent(), directory=tmp_path)
    with pytest.raises(CompressError, match=r"Task 'kind': its loss has no gradient .* or use criterion = 'magnitude'"):
        CRITERIA["taylor"](model, Prunable.of(model), bench, 1)
