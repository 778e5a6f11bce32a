"""The experiment for one GPU, on a CPU and a tiny target: it trains all three drafts, and tells how fast."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from pipelines import config
from pipelines.learning_curve import read_curve
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import Workplace, read, run

KINDS = ("dflash", "dspark", "eagle3")
_SIZES = {"vocabulary": 64, "block": 3, "anchors": 4, "sequences_per_step": 2, "row_tokens": 128}
TINY = (
    *(f"draft.{kind}.{name}={size}" for kind in KINDS for name, size in _SIZES.items()),
    "~prompts.magpie",
    "~prompts.chitchat",
    "draft.dspark.taps=[0,2]",
    "draft.dflash.taps=[0,2]",
    "draft.eagle3.taps=[0,1,2]",
    "corpus.taps=[0,1,2]",
    "trainer.steps=12",
    "trainer.log_every_steps=2",
    "trainer.evaluate_every_steps=2",
    "trainer.peak_tflops=0.5",
    "budget.score_prompts=1",
    "lookahead.tokens=3",
)


@pytest.fixture(scope="module")
def trained(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A workplace in which the experiment has written its corpus and trained its drafts. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("single_gpu"))
    gone = ("draft", "trainer.steps", "score.screen_after")
    own = [w for w in place.words(*TINY) if w.partition("=")[0] not in gone and not w.startswith("draft.pruned.")]
    words = ["experiment=single_gpu", *own, *(w for w in TINY if w.startswith("trainer.steps"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        out, code = run(["corpus", *words])
        assert code == 0, out
        out, code = run(["build", *words])
    return Finished(place, code, out)


def metrics(trained: Finished, kind: str) -> dict[str, Any]:
    assert trained.code == 0, trained.out
    found: dict[str, Any] = read(trained.place.draft(kind) / "manifest.json")["metrics"]
    return found


def test_it_says_what_it_does_in_numbers_and_in_bf16() -> None:
    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        cfg = config.typed(compose("config", overrides=["experiment=single_gpu"]))
    assert set(cfg.draft) == {"none", *KINDS}
    assert (cfg.trainer.precision, cfg.trainer.steps, cfg.budget.responses) == ("bf16", 15000, 12288)
    per_step = {(cfg.draft[kind].sequences_per_step, cfg.draft[kind].anchors) for kind in KINDS}
    assert len(per_step) == 1, "the same conversations and anchors for all"
    assert cfg.lookahead.calibrates


@pytest.mark.parametrize("kind", KINDS)
def test_every_training_tells_how_fast_it_was(trained: Finished, kind: str) -> None:
    found = metrics(trained, kind)
    assert found["steps"] == 12
    assert found["steps_per_s"] == pytest.approx(1 / found["step_seconds"])
    assert 0 < found["tokens_per_s"] and found["steps_per_s"] < found["fed_tokens_per_s"]
    assert 0 < found["mfu"] < 1 and found["peak_tflops"] == 0.5
    assert found["mfu"] == pytest.approx(found["step_tflops"] * found["steps_per_s"] / 0.5)
    assert f"trained {kind}: " in trained.out


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_leaves_the_points_of_its_learning_curve(trained: Finished, kind: str) -> None:
    curve = read_curve(Path(trained.place.draft(kind)), block=4)
    assert [point.step for point in curve.points] == [2, 4, 6, 8, 10, 12]
    supervised = [point.supervised for point in curve.points]
    assert None not in supervised and supervised == sorted(supervised)  # type: ignore[type-var]
    assert curve.most == 4.0, "three tokens a round and one of the target's own"
