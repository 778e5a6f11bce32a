"""Rows of the benchmark, one module each: a docstring whose first line says what is compared, and a `Config`.

`Config` is a dataclass of the row's own settings (numbers, words, lists of them), which `--set ROW.NAME=VALUE` changes,
with `run(bench) -> Outcome`. Modules whose name starts with an underscore are helpers. Nothing has to be registered.
"""

import ast
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from inference.errors import InputError
from inference.plugins import plugin

if TYPE_CHECKING:
    from pipelines.bench.bench import Bench
    from pipelines.bench.outcome import Outcome

PACKAGE = __name__


class Row(Protocol):
    """Settings of a row, and its run."""

    def run(self, bench: "Bench") -> "Outcome":
        """Measure."""
        ...


def row_names() -> list[str]:
    """All rows; imports none."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def summary(name: str) -> str:
    """The first line of a row's docstring, read and not imported."""
    [path] = [Path(folder) / f"{name}.py" for folder in __path__ if (Path(folder) / f"{name}.py").is_file()]
    text = path.read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def load_row(name: str, changes: Mapping[str, str]) -> Row:
    """A row with its settings.

    Args:
        name: of the row.
        changes: settings as written on the command line.

    Raises:
        InputError: no such row or setting, or a value that is off.
    """
    row: Any = plugin(PACKAGE, name).Config()
    known = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "kind"}
    values = {}
    for key, text in changes.items():
        if key not in known:
            names = ", ".join(known) or "none"
            raise InputError(f"{name} has no setting {key!r}", where="--set", mend=f"settings are {names}")
        try:
            optional = key in getattr(row, "optional_lists", ())
            values[key] = [] if optional and not text else _converted(text, like=known[key])
        except ValueError as error:
            raise InputError(f"cannot read {text!r} ({error})", where=f"--set {name}.{key}") from None
    try:
        changed: Row = replace(row, **values)
    except ValueError as error:
        raise InputError(str(error), where=f"--set {name}") from None
    return changed


def _converted(text: str, *, like: Any) -> Any:
    """A value of the type of the one it replaces; lists are written with commas."""
    if isinstance(like, list):
        return [type(like[0])(part) for part in text.split(",")]
    if isinstance(like, bool):
        if text not in ("true", "false"):
            raise ValueError("neither true nor false")
        return text == "true"
    return type(like)(text)
