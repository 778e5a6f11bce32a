"""Corpus, draft and pair in the tracker: what each came from, by the digests that manifests and pair.json hold."""

import json
import re
from pathlib import Path

import pytest

from pipelines.artifacts import Artifact
from pipelines.files import sha256_file
from tests.pipelines.tiny import Workplace, read, run


def texts(place: Workplace) -> dict[str, str]:
    """Lineage in TensorBoard's files: run's name -> text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, str] = {}
    for folder in sorted((place.artifacts / "tracker" / "tensorboard").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["tensors"]:
            if tag.startswith("lineage/"):
                found[folder.name] = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    return found


def digests(text: str, word: str) -> dict[str, str]:
    """`made` or `from` lines: kind and name -> digest."""
    return {f"{kind} {name}": digest for kind, name, digest in re.findall(rf"{word} (\S+) (\S+) (\w{{64}})", text)}


@pytest.mark.slow
def test_a_run_leaves_the_chain_from_corpus_to_pair(tiny_place: Workplace, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tiny_place.again(tmp_path / "here")
    said, code = run(place.words("tracker=tensorboard"))
    assert code == 0 and "tracker failed" not in said
    found = texts(place)
    corpus = Artifact.load(place.only("corpus"))
    pruned = Artifact.load(place.draft("pruned"))
    assert digests(found[f"corpus-{corpus.path.name}"], "made") == {"corpus tiny": corpus.digest}
    draft_run = f"draft-pruned-{pruned.path.name}"
    assert digests(found[draft_run], "made") == {"draft tiny-pruned": pruned.digest}
    assert digests(found[draft_run], "from") == {"corpus tiny": corpus.digest}
    events = EventAccumulator(str(place.artifacts / "tracker" / "tensorboard" / draft_run))
    events.Reload()
    assert "loss" in events.Tags()["scalars"], "curve and lineage are one run"
    pair = read(place.champion / "pair.json")
    winner = place.draft(pair["draft"]["kind"])
    assert digests(found["pair-tiny-v1"], "made") == {"pair tiny": sha256_file(place.champion / "pair.json")}
    assert digests(found["pair-tiny-v1"], "from") == {
        "corpus tiny": pair["lineage"]["corpus"],
        f"draft tiny-{pair['draft']['name']}": pair["lineage"]["draft"],
    }
    assert Artifact.load(winner).digest == pair["lineage"]["draft"]
    assert '"none": 1.0' in found["pair-tiny-v1"], "speedups of all candidates"
    assert all(Artifact.load(path).verify() is None for path in place.complete("draft"))

    before = {path: path.read_bytes() for path in (place.artifacts / "tracker").rglob("*") if path.is_file()}
    assert run(place.words("tracker=tensorboard"))[1] == 0
    after = {path: path.read_bytes() for path in (place.artifacts / "tracker").rglob("*") if path.is_file()}
    assert after == before, "what is found again is not told again"


@pytest.mark.slow
def test_a_tracker_that_cannot_be_written_stops_no_stage(tiny_place: Workplace, tmp_path: Path) -> None:
    place = tiny_place.again(tmp_path / "here")
    place.artifacts.mkdir()
    (place.artifacts / "tracker").write_text("a file in the way")
    said, code = run(place.words("tracker=wandb"))
    assert code == 0 and (place.champion / "pair.json").is_file()
    assert said.count("tracker failed") == 1


def test_results_do_not_depend_on_the_tracker(tiny_place: Workplace, tmp_path: Path) -> None:
    found = []
    for tracker in ("none", "tensorboard"):
        place = tiny_place.again(tmp_path / tracker)
        for stage in ("corpus", "build"):
            assert run(place.words(f"tracker={tracker}", "draft=[lookup,pruned]", stage=stage))[1] == 0
        found.append({path.name: Artifact.load(path).digest for path in place.complete("draft")})
    assert found[0] == found[1]
    assert not (tmp_path / "none" / "artifacts" / "tracker").exists()


def test_wandb_hears_of_a_corpus_offline(tiny_place: Workplace, tmp_path: Path) -> None:
    place = tiny_place.again(tmp_path / "here")
    said, code = run(place.words("tracker=wandb", stage="corpus"))
    assert code == 0 and "tracker failed" not in said
    corpus = Artifact.load(place.only("corpus"))
    [note] = (place.artifacts / "tracker").glob("corpus-tiny-*.json")
    told = json.loads(note.read_text())
    assert (told["digest"], told["uses"], told["folder"]) == (corpus.digest, [], str(corpus.path))
    assert told["metrics"]["response_tokens"] == corpus.metrics["response_tokens"]
    assert list((place.artifacts / "tracker" / "wandb").glob("offline-run-*/*.wandb"))
