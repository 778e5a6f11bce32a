"""Where an artifact came from: code, versions, command line, platform. Never the environment, never a secret.

provenance.collect()["code"]["commit"]
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("conf", "distill", "inference", "pipelines", "train")
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "hydra-core",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages whose version can change a result."""

HIDDEN = "***"
_SECRET = re.compile(r"(^|_)(api_?key|password|passwd|secret|credentials?|(access|auth|bearer|hub|hf)_?token)$", re.I)


def is_secret(name: str) -> bool:
    """Whether a setting of this name (the last part of a dotted key) holds a secret rather than, say, `stop_token`."""
    return bool(_SECRET.search(name.rpartition(".")[2].strip("+~")))


def redacted(value: Any, *, name: str = "") -> Any:
    """Copy plain data with secrets hidden: values of secret names, and user:password in URLs."""
    if isinstance(value, Mapping):
        return {key: redacted(item, name=str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, name=name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else _without_login(value)
    return value


def redacted_argv(argv: Sequence[str]) -> list[str]:
    """The command line with the values of secret overrides and options hidden."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        key, equals, value = word.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if hide_next:
            shown.append(HIDDEN)
        elif equals:
            shown.append(f"{key}={redacted(value, name=name)}")
        else:
            shown.append(_without_login(word))
        hide_next = key.startswith("--") and not equals and is_secret(name)
    return shown


def _without_login(text: str) -> str:
    if "://" not in text or "@" not in text:
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return text
    login, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{HIDDEN}@{host}")) if at and login else text


def _git(*words: str) -> bytes | None:
    """Output of git in our checkout, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def source_digest() -> str:
    """SHA-256 over our own Python and YAML files: names the code also where there is no git."""
    digest = hashlib.sha256()
    files = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml"))
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def code() -> dict[str, str | None]:
    """The code that runs: commit, digest of uncommitted changes to tracked files (None when clean), source digest."""
    top = _git("rev-parse", "--show-toplevel")
    ours = top is not None and Path(os.fsdecode(top.rstrip(b"\n"))) == ROOT
    head = _git("rev-parse", "HEAD") if ours else None
    diff = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv") if ours else None
    return {
        "commit": head.decode("ascii").strip() if head else None,
        "dirty": hashlib.sha256(diff).hexdigest() if diff else None,
        "source": source_digest(),
    }


@functools.cache
def packages() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, str | int]:
    """Operating system and processor: no host name, no user name."""
    return {"system": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count() or 1}


def argv() -> list[str]:
    """The command line: program name without its folder, secrets hidden."""
    return [Path(sys.argv[0]).name, *redacted_argv(sys.argv[1:])]


def collect() -> dict[str, Any]:
    """Everything above, as plain data: code, packages, machine, argv."""
    return {"code": code(), "packages": packages(), "machine": machine(), "argv": argv()}
