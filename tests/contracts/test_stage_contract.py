"""What every stage keeps."""

from pathlib import Path

import pytest
import tiny
import torch

from compressor.model import MultiTaskModel
from compressor.record import sizes_of
from compressor.stages import STAGES, Stage
from profiles.settings import Settings

SETTINGS = {
    "prune": {"macs": 0.7, "rounds": 1, "batches": 2, "recover": {"steps": 1}},
    "ticket": {"keep_ratio": 0.5, "rounds": 2, "train": {"steps": 2}},
    "finetune": {"steps": 2},
    "pathway": {},
    "quantize": {"batches": 2},
}
"""The least a recipe says of each; a new stage adds its line."""


@pytest.mark.parametrize("kind", STAGES)
class TestStage:
    def make(self, kind: str) -> Stage:
        made = STAGES[kind].model_validate({"kind": kind, **SETTINGS[kind]})
        assert isinstance(made, Stage)
        return made

    def run(self, kind: str, folder: Path) -> tuple[MultiTaskModel, MultiTaskModel]:
        given = tiny.model()
        return given, self.make(kind).run(given, tiny.bench(given, folder))

    def test_is_a_documented_table_of_its_kind(self, kind: str) -> None:
        stage = self.make(kind)
        assert isinstance(stage, Settings) and stage.kind == kind and stage.train_steps >= 0
        assert stage.model_config["extra"] == "forbid" and stage.model_config["frozen"]
        assert type(stage).__doc__

    def test_keeps_tasks_shapes_and_the_model_it_was_given(self, kind: str, tmp_path: Path) -> None:
        before = {name: value.clone() for name, value in tiny.model().module.state_dict().items()}
        given, made = self.run(kind, tmp_path)
        assert all(torch.equal(value, before[name]) for name, value in given.module.state_dict().items())
        assert given.kept == {} and given.masks == {}
        assert made.tasks == given.tasks
        assert not made.module.training
        with torch.no_grad():
            wanted, answered = given.answers(*given.inputs), made.answers(*made.inputs)
        assert {n: a.shape for n, a in answered.items()} == {n: a.shape for n, a in wanted.items()}

    def test_never_grows_the_network(self, kind: str, tmp_path: Path) -> None:
        given, made = self.run(kind, tmp_path)
        assert all(now <= before for now, before in zip(sizes_of(made), sizes_of(given), strict=True))

    def test_its_result_comes_back_from_disk(self, kind: str, tmp_path: Path) -> None:
        _, made = self.run(kind, tmp_path)
        made.save(tmp_path)
        back = MultiTaskModel.load(tmp_path, tiny.Tiny())
        assert back.kept == made.kept and back.masks.keys() == made.masks.keys()
        with torch.no_grad():
            wanted, answered = made.answers(*made.inputs), back.answers(*back.inputs)
        assert all(torch.equal(wanted[name], answered[name]) for name in wanted)

    def test_repeats_itself_bit_for_bit(self, kind: str, tmp_path: Path) -> None:
        first, second = (self.run(kind, tmp_path)[1].module.state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
