"""Dependencies point one way, nothing is unpickled, and the rooms look alike: read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "conf": set(),
    "inference": set(),
    "train": set(),
    "distill": {"inference"},
    "pipelines": {"inference", "train", "distill", "conf"},
}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "numpy.load", "np.load"}
EDGE_ONLY = {"hydra", "omegaconf"}
SOURCES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.Module, *, package: str) -> Iterator[tuple[str, int]]:
    """Dotted names a module imports, at the top or inside functions, by statement or by import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            yield ".".join([*parts, *([node.module] if node.module else [])]), node.lineno
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, or "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def faults(source: str, *, path: str) -> list[str]:
    """What a module does that its room may not do."""
    room, tree = path.split("/")[0], ast.parse(source)
    package = path.removesuffix(".py").replace("/", ".").rpartition(".")[0]
    found = []
    for name, line in imported(tree, package=package):
        top = name.partition(".")[0]
        if top in MAY_IMPORT and top != room and top not in MAY_IMPORT[room]:
            found.append(f"{path}:{line} {room} imports {name}")
        if top in PICKLERS:
            found.append(f"{path}:{line} imports {name}")
        if top in EDGE_ONLY and room != "pipelines":
            found.append(f"{path}:{line} imports {name} below the edge")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in UNSAFE_CALLS or called == "print":
                found.append(f"{path}:{node.lineno} calls {called}")
            if any(k.arg == "trust_remote_code" and getattr(k.value, "value", None) is True for k in node.keywords):
                found.append(f"{path}:{node.lineno} trusts remote code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_does_only_what_its_room_may(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), path=name_of(path)) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train/loop.py", "import distill.drafts"),
        ("inference/decoder.py", "def f():\n    from pipelines import files"),
        ("inference/decoder.py", "import importlib\nimportlib.import_module('train.loop')"),
        ("distill/drafts/pruned.py", "from train.loop import fit"),
        ("train/loop.py", "from omegaconf import OmegaConf"),
        ("pipelines/run.py", "import pickle"),
        ("train/checkpoint.py", "import torch\ntorch.save({}, 'x')"),
        ("pipelines/run.py", "import yaml\nyaml.load('x')"),
        ("inference/model.py", "f(trust_remote_code=True)"),
        ("inference/model.py", "print('x')"),
    ],
)
def test_the_rule_sees_each_way_to_break_it(path: str, source: str) -> None:
    assert len(faults(source, path=path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distill/drafts/pruned.py", "from inference.errors import InputError"),
        ("pipelines/run.py", "from omegaconf import OmegaConf\nimport train.loop, distill, inference"),
        ("distill/drafts/pruned.py", "from . import none\nfrom .none import Config"),
        ("pipelines/publish.py", "import yaml\nyaml.safe_load('x')"),
    ],
)
def test_the_rule_leaves_what_is_allowed(path: str, source: str) -> None:
    assert faults(source, path=path) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_is_a_typed_package(room: str) -> None:
    assert (ROOT / room / "py.typed").is_file()
    without = {path.parent for path in (ROOT / room).rglob("*.py")} - {
        path.parent for path in (ROOT / room).rglob("__init__.py")
    }
    assert without == set(), "every folder with modules has an __init__.py"


def test_source_and_configuration_are_ascii() -> None:
    files = [*SOURCES, *(ROOT / "conf").rglob("*.yaml"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    assert [name_of(path) for path in files if not path.read_bytes().isascii()] == []


def test_configuration_holds_no_code() -> None:
    assert [name_of(path) for path in (ROOT / "conf").rglob("*.py")] == ["conf/__init__.py"]
    assert [name_of(path) for path in (ROOT / "conf").rglob("*.yaml") if "_target_" in path.read_text("utf-8")] == []
