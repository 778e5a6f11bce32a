"""The seed drafts that come with dspark: whole, small, and no more than their manifests say."""

import hashlib
import json
from pathlib import Path

import pytest

from inference.feature_networks._checkpoint import misfit
from tests.inference import real

SEEDS = Path(__file__).resolve().parents[2] / "distill" / "seeds"
LARGEST = 24 * 2**20


@pytest.mark.parametrize("folder", sorted(SEEDS.iterdir()), ids=lambda folder: folder.name)
def test_a_seed_is_what_its_manifest_says(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = sorted(file for file in (folder / "draft").iterdir())
    assert {f"draft/{file.name}" for file in files} == manifest["files"].keys()
    for file in files:
        data = file.read_bytes()
        recorded = manifest["files"][f"draft/{file.name}"]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (recorded["bytes"], recorded["sha256"])
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert {"corpus", "argv", "seed", "code", "scorecard", "metrics"} <= manifest.keys()
    assert not any("/" in word.split("=")[-1] for word in manifest["argv"]), "no path of the machine it was made on"


@pytest.mark.real
def test_the_seed_of_the_embedded_target_fits_it() -> None:
    assert misfit(SEEDS / "smollm2-135m" / "draft", real.target_folder()) == ""
