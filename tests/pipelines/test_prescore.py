"""The best candidates by the pre-score are decoded, the others are named with what was expected of them, and the stages
after the score do without them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines import prescore, score
from pipelines.prescore import PRESCORE_FILE, Ranked, Ranking, prescore_markdown
from pipelines.stage_config import ScoreConfig
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import Workplace, read, records, run

ONE = ("score.decode_best=1", "score.prescore_prompts=1")


@pytest.fixture
def place(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A workplace whose drafts are built and not scored: none, look-up and a pruned one."""
    monkeypatch.chdir(tmp_path)
    # Requests of microseconds, one arm beside the baseline: on a busy machine their speeds say nothing.
    monkeypatch.setattr(score, "_ABOVE_TAU", 100.0)
    own = finished.place.again(tmp_path / "place")
    for kind in ("plan", "corpus", "draft"):
        shutil.copytree(finished.place.artifacts / kind, own.artifacts / kind)
    return own


def arms(folder: Path) -> set[str]:
    """Those that were decoded."""
    return {row["arm"] for row in records(folder)}


def test_only_the_best_candidate_is_decoded_and_the_later_stages_take_what_there_is(place: Workplace) -> None:
    out, code = run(place.words(*ONE))
    assert code == 0, out
    folder = place.only("score")
    ranking = read(folder / PRESCORE_FILE)
    best, other = ranking["candidates"]
    assert {best["arm"], other["arm"]} == {"lookup", "pruned"}
    assert (best["decoded"], other["decoded"]) == (True, False)
    assert best["prescore"]["speedup"] >= other["prescore"]["speedup"]
    # One prompt of each domain that has validation prompts, at two temperatures.
    assert ranking["responses"] in (2, 4, 6) and set(best["prescore"]["taus"]) == {"0", "1"}
    assert arms(folder) == {"none", best["arm"]}
    assert read(folder / "scorecard.json")["prescore"] == ranking
    page = (folder / "scorecard.md").read_text()
    assert "## Pre-score (validation prompts)" in page
    [left_out] = [line for line in page.splitlines() if line.startswith(f"| {other['arm']} |")]
    assert left_out.endswith("| no |") and page.count("| yes |") == 1
    assert f"decoded are {best['arm']} (" in out and f"left out are {other['arm']} (" in out
    decision = read(place.only("select") / "decision.json")
    assert {candidate["arm"] for candidate in decision["candidates"]} == {"none", best["arm"]}
    assert (place.champion / "report.html").is_file()
    assert "## Pre-score" in (place.champion / "scorecard.md").read_text()


def test_greedy_expectations_are_what_decoding_the_same_prompts_gives(place: Workplace) -> None:
    """On validation prompts the pre-score of the only block length is the tau of decoding, not about it."""
    from inference.decoder import decode
    from inference.lookahead.fixed import FixedLookahead
    from inference.randomness import TorchSource
    from inference.request import Request

    compared: dict[str, tuple[float, float]] = {}
    made = prescore._prescores

    def watched(context: Any, drafts: Any, validation: Any, stops: Any, **named: Any) -> Any:
        found, count = made(context, drafts, validation, stops, **named)
        cfg = context.cfg
        prompts = prescore.round_robin(prescore.by_domain(validation, cfg.seed), cfg.score.prescore_prompts)
        request = Request(
            settings=cfg.decode.settings(0.0), max_new_tokens=cfg.decode.max_new_tokens, stop_tokens=stops
        )
        for name, arm in drafts.items():
            done = [
                decode(
                    arm.target,
                    arm.drafter,
                    prompt.tokens,
                    request=request,
                    lookahead=FixedLookahead(3),
                    generator=TorchSource.seeded(0),
                )
                for prompt in prompts
            ]
            compared[name] = found[name].taus["0"], sum(len(d.tokens) for d in done) / sum(d.passes for d in done)
        return found, count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prescore, "_prescores", watched)
        out, code = run(place.words(*ONE, "lookahead.tokens=3", "decode.max_new_tokens=40", stage="score"))
    assert code == 0, out
    assert set(compared) == {"lookup", "pruned"}
    for name, (expected, measured) in compared.items():
        assert expected == pytest.approx(measured, abs=1e-12), name


def test_an_interrupted_score_goes_by_the_ranking_it_has_made(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "make_score_plan", killed)
        assert run(place.words(*ONE, stage="score"))[1] != 0
    [partial] = (place.artifacts / "score").glob(".partial-*")
    ranking = read(partial / PRESCORE_FILE)
    kept, left_out = (row["arm"] for row in ranking["candidates"])
    # Had it been made anew, it would not be the other way round.
    for row in ranking["candidates"]:
        row["decoded"] = not row["decoded"]
    (partial / PRESCORE_FILE).write_text(json.dumps(ranking))
    monkeypatch.setattr(prescore, "_prescores", killed)
    out, code = run(place.words(*ONE, stage="score"))
    assert code == 0, out
    assert arms(place.only("score")) == {"none", left_out} != {"none", kept}


@pytest.mark.parametrize("words", [("score.decode_best=0",), ("score.decode_best=2",)])
def test_nothing_is_ranked_where_all_are_decoded_anyway(place: Workplace, words: tuple[str, ...]) -> None:
    out, code = run(place.words(*words, stage="score"))
    assert code == 0, out
    assert arms(place.only("score")) == {"none", "lookup", "pruned"}
    assert not (place.only("score") / PRESCORE_FILE).exists()
    assert "Pre-score" not in (place.only("score") / "scorecard.md").read_text()
    assert read(place.only("score") / "scorecard.json")["prescore"] is None


def test_a_draft_without_a_pre_score_is_decoded_in_any_case(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.drafters.lookup.LookupDrafter.rehearse", lambda *_, **__: None)
    out, code = run(place.words(*ONE, stage="score"))
    assert code == 0, out
    assert arms(place.only("score")) == {"none", "lookup", "pruned"}
    assert "lookup (no pre-score)" in out and "left out are none" in out
    assert "| lookup | - | - | - | - | yes |" in (place.only("score") / "scorecard.md").read_text()


def test_a_ranking_without_any_pre_score_is_a_table_too() -> None:
    page = prescore_markdown(Ranking([Ranked("made", None, decoded=True)], 0, 0.1))
    assert "| draft | block | expected speedup | decoded |" in page and "| made | - | - | yes |" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode_best": -1}, r"score.decode_best is -1; use 0 to decode every candidate"),
        ({"prescore_prompts": 0}, r"score.prescore_prompts is 0; use at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig(**settings)  # type: ignore[arg-type]
