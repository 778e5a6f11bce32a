"""Versions that are whole in every way but one: nothing can be decoded with them.

publish(root, "pair", speedup=1.5)     # v1, sealed and champion
"""

import json
from pathlib import Path
from typing import Any

from inference.pair_files import PAIR_FILE
from pipelines.files import sha256_bytes
from pipelines.pairs.digests import seal
from pipelines.registry import CHAMPION, move_alias, next_version

WEIGHTS = "draft/model.safetensors"


def estimate(value: float) -> dict[str, float]:
    """A figure with an interval of a tenth on either side."""
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def card(speedup: float, domain: str = "overall", temperature: float | None = None) -> dict[str, Any]:
    """A scorecard, as far as anything here reads it."""
    figures = {name: estimate(speedup) for name in ("speedup", "tau", "alpha", "tokens_per_s")}
    return {"domain": domain, "temperature": temperature, "requests": 4, **figures}


def info(name: str, version: str, *, speedup: float, weights: bytes, **more: Any) -> dict[str, Any]:
    """What `pair.json` says."""
    return {
        "schema_version": 1,
        "name": name,
        "version": version,
        "created": "2026-11-27T12:00:00+00:00",
        "target": {"path": "org/target", "revision": "", "digest": "7" * 64, "attention": "sdpa"},
        "draft": {"name": "seed", "kind": "made", "files": {"model.safetensors": sha256_bytes(weights)}},
        "decoding": {"precision": "fp32", "lookahead": {"kind": "fixed", "tokens": 4}},
        "decision": {"reason": "it is faster", "candidates": []},
        "training": {"steps": 10},
        "scorecard": [card(speedup), card(speedup, "chat", 0.0)],
        "cost_profile": {"device": "a machine", "versions": {"torch": "2"}},
        "lineage": {"corpus": "1" * 64, "code": {"commit": "abc"}},
        **more,
    }


def write(folder: Path, name: str, version: str, *, speedup: float = 1.5, **more: Any) -> Path:
    """The files of a version, not sealed."""
    weights = f"weights of {speedup}".encode() * 50
    (folder / "draft").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / "draft" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(f"# {name} {version}\n\nA pair.\n", encoding="utf-8")
    (folder / "serve" / "vllm").mkdir(parents=True)
    (folder / "serve" / "vllm" / "engine.json").write_text("[]", encoding="utf-8")
    content = json.dumps(info(name, version, speedup=speedup, weights=weights, **more))
    (folder / PAIR_FILE).write_text(content, encoding="utf-8")
    return folder


def publish(root: Path, name: str = "pair", *, speedup: float = 1.5, sealed: bool = True, **more: Any) -> Path:
    """The next version of a pair, made champion."""
    version = next_version(root, name)
    folder = write(root / name / version, name, version, speedup=speedup, **more)
    if sealed:
        seal(folder)
    move_alias(root, name, CHAMPION, version, reason=f"speedup {speedup}")
    return folder
