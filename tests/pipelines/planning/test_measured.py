"""A plan against a real, short run of the embedded target: what does not depend on the machine must agree."""

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipelines.artifacts import Artifact
from tests.pipelines.tiny import read, run

DRAFTS = ("pruned", "eagle3", "dspark")
RESPONSES = 12


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("measured")
    return [
        "experiment=smoke",
        f"draft=[none,{','.join(DRAFTS)}]",
        f"budget.responses={RESPONSES}",
        "corpus.max_new_tokens=32",
        "trainer.steps=2",
        "trainer.precision=fp32",
        f"paths.artifacts={root / 'artifacts'}",
        f"paths.registry={root / 'registry'}",
        f"hydra.run.dir={root / 'outputs'}",
    ]


@pytest.fixture(scope="module")
def corpus(words: list[str]) -> Artifact:
    for stage in ("corpus", "build"):
        text, code = run([stage, *words])
        assert code == 0, text
    [folder] = [path for path in (artifacts(words) / "corpus").iterdir() if path.is_dir()]
    return Artifact.load(folder)


@pytest.fixture(scope="module")
def figures(words: list[str], corpus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plan of this very run, for a machine that is described, so that nothing is timed."""
    tokens, written = corpus.metrics["tokens"], corpus.metrics["response_tokens"]
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    described = (
        "plan.tflops=0.1",
        "plan.bandwidth_gb_s=10",
        f"plan.prompt_tokens={(tokens - written) / RESPONSES}",
        f"plan.response_tokens={written / RESPONSES}",
        f"plan.json={out}",
    )
    text, code = run(["plan", *words, *described])
    assert code == 0, text
    data: dict[str, Any] = read(out)
    return data


def artifacts(words: list[str]) -> Path:
    return Path(next(word for word in words if word.startswith("paths.artifacts=")).partition("=")[2])


def draft_folder(words: list[str], kind: str) -> Path:
    manifests = (artifacts(words) / "draft").glob("*/manifest.json")
    return next(path.parent for path in manifests if read(path)["metrics"]["kind"] == kind)


def parameters(file: Path) -> int:
    """Numbers in a file of weights; token ids do not count."""
    with safe_open(file, framework="pt") as tensors:
        slices = [tensors.get_slice(name) for name in tensors.keys() if name not in ("d2t", "t2d")]
        return sum(math.prod(piece.get_shape()) for piece in slices)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(1200)
def test_the_corpus_has_the_bytes_that_were_planned(corpus: Artifact, figures: dict[str, Any]) -> None:
    def size(pattern: str) -> int:
        return sum(file.stat().st_size for file in corpus.path.glob(pattern))

    features, planned = size("*.features.safetensors"), figures["corpus"]["disk"]
    tokens_and_states = size("*.safetensors") - features
    # The plan takes whole tokens for a mean conversation: less than half a token of a hundred.
    assert math.isclose(features, planned["features"], rel_tol=0.01)
    assert math.isclose(tokens_and_states, planned["tokens"] + planned["states"], rel_tol=0.01)
    assert math.isclose(figures["corpus"]["to_write"], corpus.metrics["response_tokens"], rel_tol=0.02)
    kept = corpus.metrics["feature_bytes_per_token"]["reference_cache"]
    assert math.isclose(figures["corpus"]["reference_cache"], kept * corpus.metrics["tokens"], rel_tol=0.01)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_has_the_numbers_and_bytes_that_were_planned(
    kind: str, words: list[str], corpus: Artifact, figures: dict[str, Any]
) -> None:
    file = draft_folder(words, kind) / "draft" / "model.safetensors"
    draft = figures["drafts"][kind]
    assert parameters(file) == draft["parameters"]
    assert math.isclose(file.stat().st_size, draft["disk"], rel_tol=0.01), "a header comes on top"
    assert draft["steps"] == 2 and draft["captured"] == 0
