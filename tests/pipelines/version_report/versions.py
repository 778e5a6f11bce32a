"""A version folder made by hand from made-up records: every part of a report, or as few as there can be."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.statistics import scorecards
from pipelines.realign.cycle import Ended, end
from pipelines.registry import move_alias
from pipelines.select import decide
from pipelines.stage_config import SelectConfig
from tests.pipelines.test_decisions import Made, made

NAME, VERSION = "pair", "v1"
DRAFTS = {"fast": Made(2.0, 12.0, mib=20, noise=0.1), "slow": Made(1.5, 20.0, mib=50, noise=0.1)}


def write_version(
    root: Path,
    drafts: Mapping[str, Made] = DRAFTS,
    *,
    prompts: int = 12,
    price: float = 0.0,
    **changes: Any,
) -> Path:
    """The files without which there is no report; returns the folder.

    Args:
        root: of the registry.
        drafts: besides the baseline.
        prompts: scored, in three domains.
        price: per hour.
        changes: to `pair.json`.
    """
    folder = root / NAME / VERSION
    folder.mkdir(parents=True)
    records = made(drafts, prompts=prompts)
    decision = decide(scorecards(records), records, cfg=SelectConfig(), seed=0)
    info = {
        "schema_version": 1,
        "name": NAME,
        "version": VERSION,
        "created": "2026-11-27T12:00:00+00:00",
        "target": {"path": "org/some-target", "revision": "", "digest": "ab" * 32, "attention": "sdpa"},
        "draft": {"name": decision.winner, "kind": "model", "files": {}},
        "decoding": {"precision": "fp32", "lookahead": {"kind": "fixed", "tokens": 1}, "measured": None},
        "decision": asdict(decision),
        "training": {},
        "cost_profile": {"device": "Some CPU"},
        "lineage": {"corpus": "c0ffee", "code": {"commit": "1234abc", "dirty": None}, "argv": ["dspark", "a b"]},
        **changes,
    }
    (folder / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in records), encoding="utf-8")
    write(folder / "scorecard.json", {"seed": 0, "price_per_hour": price})
    write(folder / "pair.json", info)
    return folder


def write(path: Path, data: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def add_everything(folder: Path, root: Path) -> None:
    """Every part a version may have besides, and a history in its registry."""
    write(folder / "training.json", {"slow": {"steps": 5, "tokens": 50, "seconds": 30.0}, "fast": {"seconds": 10.0}})
    took = {"seconds": 12.34, "resident_bytes": 300 * 2**20, "device_bytes": 0, "since_start": False}
    on_gpu = {**took, "device_bytes": 50 * 2**20, "resumed": True}
    write(folder / "stages.json", {"corpus": took, "build: fast": on_gpu, "publish": {**took, "since_start": True}})
    rows: list[dict[str, float]] = [{"step": s, "loss": 5.0 / s, "acceptance": 0.1 * s} for s in (1, 2, 3)]
    write(folder / "history.json", [*rows, {"step": 3, "eval/acceptance": 0.25}])
    write(folder / "calibration-fast.json", {"positions": [position(1), position(2)]})
    write(folder / "examples.json", [example("Why <b>?", [("It", "accepted", 1), (" is", "target", 1)])])
    served = [{"engine": "vllm", "command": "vllm serve $TARGET", "refuses": ""}]
    served.append({"engine": "sglang", "command": "", "refuses": "it has no such draft"})
    export = {"layout": "eagle3", "folder": "eagle3", "tokens": 2, "engines": served, "files": {}}
    write(folder / "serve" / "exports.json", {"schema_version": 1, "exports": [export]})
    write(folder / "load.json", {"figures": [load_figure(1, 1.5), load_figure(8, 0.9)]})
    move_alias(root, NAME, "champion", VERSION, reason="it is faster")
    end(root / NAME, ended("kept", 0.98, ended="2026-11-28T12:00:00+00:00"))


def ended(outcome: str, speed_ratio: float, *, ended: str) -> Ended:
    """A re-alignment."""
    return Ended(
        id=ended,
        started=ended,
        ended=ended,
        outcome=outcome,
        reason="not shown to be faster",
        champion="v1",
        version="",
        target_digest="ab",
        figures={"speed_ratio": speed_ratio, "why": ["acceptance on chat fell"]},
    )


def position(number: int) -> dict[str, Any]:
    """One position of a calibration as it is written; its margins gave no chance."""
    known = {"value": 0.1, "low": 0.05, "high": 0.2}
    return {
        "position": number,
        "proposed": 30,
        "observations": 20,
        "error_before": known,
        "error_after": {"value": 0.02, "low": None, "high": None},
        "auc": known,
        "margin_auc": {"value": None, "low": None, "high": None},
        "before": [[0.2, 0.4, 10], [0.8, 0.9, 20]],
        "after": [[0.4, 0.4, 10], [0.9, 0.9, 20]],
    }


def example(prompt: str, tokens: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """A worked example as it is written."""
    rows = [{"text": text, "kind": kind, "round": number} for text, kind, number in tokens]
    return {"prompt": prompt, "domain": "chat", "temperature": 0.0, "tau": 2.0, "tokens": rows}


def load_figure(concurrency: int, over_none: float) -> dict[str, Any]:
    """The scheduler in a closed loop, as `dspark load` writes it."""
    estimate = {"value": over_none, "low": over_none - 0.05, "high": over_none + 0.05}
    return {
        "arm": "scheduled",
        "point": {"kind": "closed", "concurrency": concurrency, "share": 0.0},
        "precision": "fp32",
        "blocks": 3,
        "requests": 9,
        "tokens_per_s": estimate,
        "over_none": estimate,
        "over_fixed": None,
        "best_fixed": False,
        "mean_length": 2.0,
        "tau": 1.8,
        "alpha": 0.5,
        "token_ms": [10.0, 20.0],
        "request_token_ms": [10.0, 20.0],
        "first_ms": [10.0, 20.0],
        "total_ms": [10.0, 20.0],
        "round_ms": 20.0,
        "outside_round_ms": 1.0,
        "outside_request_ms": 1.0,
        "mismatches": 0,
        "unexplained": 0,
    }
