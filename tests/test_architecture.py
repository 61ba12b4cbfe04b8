"""Rules that the folders and files keep, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compressor", "targets", "profiles")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
EVERYTHING = sorted({*SOURCES, *(f for place in ("examples", "tests", "tools") for f in (ROOT / place).rglob("*.py"))})
MOST_LINES = 400
ABOVE = {"compressor": set(), "targets": {"compressor"}, "profiles": {"compressor", "targets"}}
"""What a package must not import."""


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the dotted name of what it calls, as it is written."""
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_imports_go_one_way_and_tvm_stays_in_targets(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    roots = {module.partition(".")[0] for module in imports(parsed(file))}
    assert not roots & ABOVE[package]
    assert not roots & {"tests", "examples", "tools"}
    assert package == "targets" or "tvm" not in roots
    assert package == "compressor" or "torch" not in roots


@pytest.mark.parametrize("file", EVERYTHING, ids=name)
def test_no_pickle_is_ever_opened(file: Path) -> None:
    tree = parsed(file)
    assert not {"pickle", "cPickle", "dill", "joblib", "cloudpickle"} & {m.partition(".")[0] for m in imports(tree)}
    for called, call in calls(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert called != "torch.load" or options.get("weights_only") == "True"
        assert called not in ("np.load", "numpy.load") or options.get("allow_pickle", "False") == "False"


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_a_module_is_short_and_says_what_it_is_for(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert ast.get_docstring(parsed(file)) is not None


def test_every_folder_of_sources_is_a_package() -> None:
    """Only packages are installed (pyproject.toml)."""
    assert not [name(file) for file in SOURCES if not (file.parent / "__init__.py").exists()]


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_nothing_is_left_for_later(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text]
    assert file.stem not in ("utils", "helpers", "common", "misc")


def test_only_the_pipeline_knows_the_order() -> None:
    """Nobody imports the pipeline but the command line, and the sweep that runs it often; no stage another stage."""
    for file in SOURCES:
        for module in imports(parsed(file)):
            assert module != "compressor.pipeline" or file.name in ("cli.py", "sweep.py")
            inside = file.parent.name == "stages" and file.name != "__init__.py"
            assert not (inside and module.startswith("compressor.stages"))
