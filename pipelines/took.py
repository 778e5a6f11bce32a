"""What the stages of a run took: seconds and most memory of each, as they were measured when it was made.

The figures come from the manifests of artifacts and, of publishing, from the version itself. Nothing is measured here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.artifacts import Artifact
from pipelines.files import read_json

STAGES_FILE = "stages.json"
"""In a published version: stage -> `train.memory.Took` as plain data, whether it was resumed, how fast it trained."""
PUBLISH, FRESH = "publish", "publish: fresh process"
MIB = 2**20
_SPEED = ("steps_per_s", "tokens_per_s", "mfu")
_SINCE_START, _RESUMED = "most memory since the process began", "after its last resume"


def stages_of(
    *, plan: Artifact, corpus: Artifact, drafts: Mapping[str, Artifact], score: Artifact, select: Artifact
) -> dict[str, dict[str, Any]]:
    """Figures of the stages before publishing; artifacts that are older than these figures have none."""
    builds = {f"build: {name}": draft for name, draft in drafts.items()}
    made = {"plan": plan, "corpus": corpus, **builds, "score": score, "select": select}
    return {
        stage: {**artifact.manifest["took"], **_speed(artifact)}
        for stage, artifact in made.items()
        if "took" in artifact.manifest
    }


def _speed(artifact: Artifact) -> dict[str, Any]:
    """Of a draft that was trained, under its own name; nothing of others."""
    known = {key: artifact.metrics[key] for key in _SPEED if key in artifact.metrics}
    return {"training": known} if "steps_per_s" in known else {}


def read_stages(version: Path) -> dict[str, dict[str, Any]]:
    """Figures of a published version; empty where it is older than they are."""
    path = version / STAGES_FILE
    stages: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
    return stages


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: stage, seconds, memory of the process and of its GPU, and what to know of them."""
    rows = [
        [
            stage,
            f"{took['seconds']:.1f}",
            f"{took['resident_bytes'] / MIB:.0f}",
            f"{took['device_bytes'] / MIB:.0f}" if took["device_bytes"] else "-",
            "; ".join(_notes(took)),
        ]
        for stage, took in stages.items()
    ]
    header = ["stage", "seconds", "peak memory, MiB", "peak on the GPU, MiB", "note"]
    noted = len(header) if any(row[-1] for row in rows) else len(header) - 1
    return header[:noted], [row[:noted] for row in rows]


def _notes(took: Mapping[str, Any]) -> list[str]:
    found = [_SINCE_START] if took["since_start"] else []
    if took.get("resumed"):
        found.append(_RESUMED)
    if speed := took.get("training"):
        mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        found.append(f"{speed['steps_per_s']:.3g} steps/s, {speed['tokens_per_s']:,.0f} supervised tokens/s{mfu}")
    return found
