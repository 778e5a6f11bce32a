"""Code prompts that every machine has: signature and docstring of the functions in Python's own standard library.

The files are parsed, never imported. Another Python version has another standard library, hence other prompts; the
corpus's digest shows it.
"""

import ast
import logging
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill.prompts import Prompt, SourceConfig, SourceContext, rank
from inference.errors import InputError

log = logging.getLogger(__name__)

SKIPPED_FOLDERS = ("site-packages", "dist-packages")  # installed by others, inside the library's folder

# Worded unlike any held-out prompt, so that the wording itself is no ten-word overlap.
TASKS = (
    "Implement this Python {what} so that it does what its docstring says.\n\n```python\n{stub}\n```",
    "Explain what the following Python {what} is for, then show a short usage example.\n\n```python\n{stub}\n```",
)


@dataclass
class Config(SourceConfig):
    """Public functions and methods with a docstring."""

    kind: str = "stdlib"
    domain: str = "code"
    folder: str = ""
    """Folder to walk (empty = the standard library of the running Python)."""
    min_chars: int = 60
    """Shortest docstring taken, in characters."""
    max_chars: int = 900
    """Longest docstring taken, in characters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError(
                f"stdlib: docstrings of {self.min_chars} to {self.max_chars} characters: "
                "use 1 <= min_chars <= max_chars"
            )

    def read(self, context: SourceContext) -> list[Prompt]:
        """Walk the folder in the order of its file names, each file from top to bottom.

        Every function is put as one of two tasks, implement or explain, chosen by a hash of its name.

        Raises:
            InputError: no function with a docstring was found.
        """
        root = Path(self.folder or sysconfig.get_paths()["stdlib"])
        prompts: list[Prompt] = []
        for path in _public_files(root):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            for owner, node, docstring in _functions(_parse(path)):
                if self.min_chars <= len(docstring) <= self.max_chars:
                    name = f"{module}:{node.lineno}:{owner}{node.name}"
                    text = _task(name, node, docstring=docstring, module=module, owner=owner)
                    prompts.append(Prompt(name, self.domain, self.kind, (text,), heldout=self.heldout))
        if not prompts:
            raise InputError("no function with a docstring", where=str(root), mend="set folder to one with .py files")
        return prompts


def _public_files(root: Path) -> Iterator[Path]:
    """Yield the modules whose path has no part with a leading underscore (`__init__.py` excepted), sorted."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        private = any(part.startswith("_") for part in parts[:-1]) or (
            parts[-1][0] == "_" and parts[-1] != "__init__.py"
        )
        if not private and not set(parts) & set(SKIPPED_FOLDERS):
            yield path


def _parse(path: Path) -> ast.Module:
    """Parse a file; one that is no valid Python (the library has some, on purpose, in its tests) counts as empty."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old files are none of the user's business
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        log.debug("skipped %s: not valid Python", path)
        return ast.Module(body=[], type_ignores=[])


def _functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield (dotted owner with a trailing dot or "", function, docstring) for public functions, top to bottom."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and not node.name.startswith("_"):
                yield owner, node, docstring
            yield from _functions(node, f"{owner}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{owner}{node.name}.")
        elif isinstance(node, ast.stmt | ast.ExceptHandler):  # if, try, with: functions may be defined inside
            yield from _functions(node, owner)


def _task(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, *, docstring: str, module: str, owner: str) -> str:
    """Word the prompt: the task, then a stub of the function with its docstring."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    signature = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"
    quoted = docstring.replace("\\", "\\\\").replace('"""', r"\"\"\"")
    body = "\n".join(f"    {line}" if line.strip() else "" for line in f'"""{quoted}"""'.splitlines())
    where = f"method of `{owner[:-1]}` (module `{module}`)" if owner else f"function (module `{module}`)"
    task = TASKS[rank(name, seed=0)[0] % len(TASKS)]
    return task.format(what=where, stub=f"{signature}\n{body}")
