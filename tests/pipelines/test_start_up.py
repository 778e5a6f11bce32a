"""Commands that need no model start without the libraries that models need, whatever the machine."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from inference.traffic import TrafficLog
from pipelines.cli import OWN_WORDS
from tests.inference.test_traffic import record
from tests.pipelines.pairs.fake import publish
from tests.pipelines.tiny import REPOSITORY

HEAVY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "fastapi",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "peft",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
    "wandb",
)
MOST_CPU_SECONDS = 4.0
"""Several times what these commands need, and no more than what importing torch and transformers alone takes."""

COMMAND = """
from pipelines.cli import main

try:
    code = main(sys.argv[1:])
except SystemExit as end:  # of --help
    code = end.code or 0
"""
HINTS = """
import dataclasses, importlib, typing
from inference.plugins import plugins
from pipelines.config import PLUGINS, SCHEMAS, register

register()
schemas = []
for package in (package for packages in PLUGINS.values() for package in packages):
    schemas += [module.Config for module in plugins(package).values()]
for place in SCHEMAS.values():
    module, _, name = place.partition(":")
    schemas.append(getattr(importlib.import_module(module), name))
missing = [
    (schema, field.name)
    for schema in schemas
    for field in dataclasses.fields(schema)
    if field.name not in typing.get_type_hints(schema)
]
code = len(missing)
"""
AFTER = """
found = sorted(set(%r) & sys.modules.keys())
sys.stderr.write("\\n" + json.dumps({"code": code, "found": found, "cpu_s": time.process_time()}))
"""


def ran(program: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Exit code, heavy libraries imported and CPU seconds of a program in a process of its own."""
    code = f"import json, sys, time\nsys.path.insert(0, {str(REPOSITORY)!r})\n{program}{AFTER % (HEAVY,)}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder, timeout=120, check=True
    )
    outcome: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
    return outcome


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry of two versions and a traffic log."""
    folder = tmp_path_factory.mktemp("place")
    for speedup in (1.5, 1.7):
        publish(folder / "registry", "pair", speedup=speedup)
    TrafficLog(folder / "traffic").append(record("a"))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "--cfg job",
        "--cfg job draft=[none,dspark,eagle3,medusa,dflash,pruned] objective=mix corpus=server prompts=[magpie]",
        "score --info defaults-tree",
        "plan --help",
        *(f"{command} --help" for command in OWN_WORDS),
        "pairs list",
        "pairs show pair",
        "pairs diff pair/v1 pair/v2",
        "pairs verify pair",
        "traffic show --log traffic",
    ],
)
def test_a_command_without_a_model_imports_no_model_library(place: Path, words: str) -> None:
    outcome = ran(COMMAND, words.split(), place)
    assert (outcome["code"], outcome["found"]) == (0, [])
    assert outcome["cpu_s"] < MOST_CPU_SECONDS


@pytest.mark.parametrize("words", ["corpus target.precision=fp9", "score trainer.steps=few", "build draft=[nonsense]"])
def test_a_wrong_word_is_told_before_they_are_imported(place: Path, words: str) -> None:
    outcome = ran(COMMAND, words.split(), place)
    assert (outcome["code"], outcome["found"]) == (2, [])


def test_type_hints_of_every_schema_resolve_without_them(place: Path) -> None:
    outcome = ran(HINTS, (), place)
    assert (outcome["code"], outcome["found"]) == (0, [])


def test_what_needs_them_is_seen(place: Path) -> None:
    assert ran("import torch\ncode = 0\n", (), place)["found"] == ["torch"]
