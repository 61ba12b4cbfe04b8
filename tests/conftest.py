"""What every test may use: the tiny network and a bench, and `golden`, texts that are compared with a file."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import tiny
from torch.onnx._internal.exporter._registration import ONNXRegistry

from compressor.bench import Bench
from compressor.model import MultiTaskModel

GOLDEN = Path(__file__).parent / "golden"

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/ with what the tests produce")


@pytest.fixture(scope="session", autouse=True)
def _operators_once() -> Iterator[None]:
    """torch's exporter parses the sources of all its operators for each export, for half of a small network's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)`: the text equals the file `tests/golden/<name>`."""
    update = bool(request.config.getoption("--update-golden"))

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if update:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        if not file.is_file():
            pytest.fail(f"tests/golden/{name} does not exist; run pytest --update-golden and read the result.")
        assert text == file.read_text(encoding="utf-8"), f"differs from tests/golden/{name}; see --update-golden"

    return compare


@pytest.fixture
def model() -> MultiTaskModel:
    """The tiny trained network."""
    return tiny.model()


@pytest.fixture
def bench(model: MultiTaskModel, tmp_path: Path) -> Bench:
    """A bench around it, without budgets."""
    return tiny.bench(model, tmp_path)
