"""Find plug-ins by their place: one module in a plug-in package is one choice, and nothing has to be registered.

A published pair names a `kind`; the kind is looked up here among modules that ship with this checkout, so a downloaded
manifest can never name code of its own.
"""

import importlib
import pkgutil
from types import ModuleType

from inference.errors import InputError


def plugins(package: str) -> dict[str, ModuleType]:
    """Import every public module of a plug-in package.

    Args:
        package: dotted name of a package of ours, such as `inference.drafters`.

    Returns:
        Modules by name, sorted; modules whose name starts with an underscore are helpers and left out.
    """
    root = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


def plugin(package: str, kind: str) -> ModuleType:
    """Return one plug-in module by kind.

    Raises:
        InputError: no such kind; the message lists the kinds there are.
    """
    root = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_"))
    if kind not in names:
        raise InputError(f"unknown kind {kind!r}", where=package, mend=f"choose one of {', '.join(names)}")
    return importlib.import_module(f"{package}.{kind}")
