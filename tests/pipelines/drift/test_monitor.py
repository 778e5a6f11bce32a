"""The monitor: by stratum, across restarts, and never the same request twice."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from inference.traffic import TrafficRecord
from pipelines.drift.config import DriftConfig
from pipelines.drift.fingerprints import fingerprints
from pipelines.drift.mix import LEARN, MixDetector
from pipelines.drift.monitor import (
    State,
    _lower_end,
    _t_quantile,
    alarms,
    interval,
    load,
    observe,
    references,
    save,
    stratum_name,
)
from tests.pipelines.test_decisions import Made, made

CFG = DriftConfig()
PUBLISHED = {"chat, greedy": 0.4, "code, greedy": 0.7}


def served(number: int, domain: str, rate: float, *, pair: str = "p/v1", target: str = "t") -> TrafficRecord:
    proposed = 40
    return TrafficRecord(
        id=f"{number}",
        time=float(number),
        pair=pair,
        target=target,
        arm="a",
        domain=domain,
        temperature=0.0,
        prompt=None,
        prompt_digest="",
        response=None,
        response_digest="",
        emitted=60,
        passes=40,
        proposed=[proposed],
        accepted=[round(proposed * rate)],
        seconds=1.0,
    )


def traffic(
    count: int, *, code_share: float, fall: float = 0.0, start: int = 0, seed: int = 0
) -> Iterator[TrafficRecord]:
    rng = random.Random(seed)
    for number in range(start, start + count):
        domain = "code" if rng.random() < code_share else "chat"
        mean = PUBLISHED[stratum_name(domain, 0.0)] - fall
        yield served(number, domain, min(1.0, max(0.0, rng.gauss(mean, 0.1))))


def test_rounds_of_a_tree_are_not_compared_with_those_of_chains() -> None:
    """A pair with a tree is served by both: more tokens stand at every depth of a tree."""
    published = {"code, greedy by trees of 64": 0.9}
    chains, trees = State("p/v1", "t"), State("p/v1", "t")
    low = [served(number, "code", 0.5) for number in range(600)]
    observe(chains, low, published, CFG)
    assert alarms(chains) == [] and chains.unscored == {"code, greedy": 600}
    observe(trees, [replace(record, tree=64) for record in low], published, CFG)
    (alarm,) = alarms(trees)
    assert alarm.where == "code, greedy by trees of 64"


def test_what_was_published_of_trees_is_their_own() -> None:
    by_tree = {"proposed": [10, 8, 6], "accepted": [8, 6, 3], "blocks": {"64": 10}}
    records = [
        record if record.temperature else replace(record, **by_tree)  # type: ignore[arg-type]
        for record in made({"a": Made(2.0, 10.0)})
    ]
    found = references(records, "a")
    assert {name for name in found if name.startswith("chat")} == {"chat, greedy by trees of 64", "chat, sampled"}
    assert found["chat, greedy by trees of 64"] == pytest.approx(17 / 24)


def test_sampled_rounds_of_a_tree_are_judged_by_a_score_that_had_them() -> None:
    by_tree = {"proposed": [10, 8, 6], "accepted": [8, 6, 3], "blocks": {"64": 10}}
    scored = made({"a": Made(2.0, 10.0)})
    with_trees = references([replace(record, **by_tree) for record in scored], "a")  # type: ignore[arg-type]
    chat = {name for name in with_trees if name.startswith("chat")}
    assert chat == {"chat, greedy by trees of 64", "chat, sampled by trees of 64"}
    low = [replace(served(number, "chat", 0.5), temperature=1.0) for number in range(600)]
    trees, chains, others = (State("p/v1", "t") for _ in range(3))
    observe(trees, [replace(record, tree=64) for record in low], with_trees, CFG)
    (alarm,) = alarms(trees)
    assert alarm.where == "chat, sampled by trees of 64"
    # As a server decodes them, or a pair of a score whose sampled rounds were chains.
    observe(chains, low, with_trees, CFG)
    assert alarms(chains) == [] and chains.unscored == {"chat, sampled": 600}
    observe(others, [replace(record, tree=64) for record in low], references(scored, "a"), CFG)
    assert alarms(others) == [] and others.unscored == {"chat, sampled by trees of 64": 600}


def test_a_fall_in_one_domain_is_noticed_there() -> None:
    state = State("p/v1", "t")
    observe(state, traffic(300, code_share=0.5), PUBLISHED, CFG)
    assert alarms(state) == []
    falls = [r for r in traffic(600, code_share=1.0, fall=0.1, start=300)]
    observe(state, falls, PUBLISHED, CFG)
    (alarm,) = alarms(state)
    assert alarm.where == "code, greedy" and "has fallen" in alarm.why


@pytest.mark.parametrize(("before", "after"), [(0.1, 0.9), (0.9, 0.1)])
def test_a_shift_of_the_mix_is_a_shift_of_the_mix_and_no_fall(before: float, after: float) -> None:
    state = State("p/v1", "t")
    observe(state, traffic(500, code_share=before), PUBLISHED, CFG)
    assert state.mix.evidence < CFG.mix_threshold
    observe(state, traffic(800, code_share=after, start=500, seed=1), PUBLISHED, CFG)
    assert alarms(state) == []
    assert state.mix.evidence >= CFG.mix_threshold and state.mix.psi() > 0.2


def test_pooled_over_domains_the_same_shift_would_be_a_fall() -> None:
    """The mutant: one detector for all traffic takes code -> chat for a fall of acceptance."""
    rates = [r.rate for r in traffic(500, code_share=0.9)]
    mean = sum(r for r in rates if r is not None) / len(rates)
    pooled = {"all, greedy": mean}
    state = State("p/v1", "t")
    shifted = [*traffic(500, code_share=0.9), *traffic(800, code_share=0.1, start=500, seed=1)]
    from dataclasses import replace

    observe(state, [replace(record, domain="all") for record in shifted], pooled, CFG)
    assert len(alarms(state)) == 1


def test_a_steady_mix_stays_quiet() -> None:
    loud = 0
    for seed in range(20):
        rng, mix = random.Random(seed), MixDetector()
        for _ in range(LEARN + 2000):
            mix.update(rng.choices(["chat", "code", "maths"], [0.5, 0.3, 0.2])[0])
            loud += mix.evidence >= CFG.mix_threshold
    assert loud == 0


def test_no_request_counts_twice(tmp_path: Path) -> None:
    records = list(traffic(100, code_share=0.5))
    state = State("p/v1", "t")
    observe(state, records[:60], PUBLISHED, CFG)
    save(state, tmp_path / "monitor.json")
    again = load(tmp_path / "monitor.json", pair="p/v1", target="t")
    observe(again, records, PUBLISHED, CFG)
    whole = State("p/v1", "t")
    observe(whole, records, PUBLISHED, CFG)
    for name, stratum in whole.strata.items():
        assert again.strata[name].detector.to_json() == stratum.detector.to_json()
    assert again.mix.to_json() == whole.mix.to_json()


def test_other_versions_and_targets_are_counted_and_not_judged() -> None:
    state = State("p/v1", "t")
    observe(state, [served(1, "code", 0.0, pair="p/v2"), served(2, "code", 0.0, target="u")], PUBLISHED, CFG)
    assert state.strata == {} and sum(state.others.values()) == 2


def test_a_new_version_begins_anew(tmp_path: Path) -> None:
    state = State("p/v1", "t")
    observe(state, traffic(50, code_share=0.5), PUBLISHED, CFG)
    save(state, tmp_path / "monitor.json")
    assert load(tmp_path / "monitor.json", pair="p/v2", target="t").strata == {}


def test_a_state_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "monitor.json"
    path.write_text('{"schema": 1, "pair": "p/v1"')
    assert load(path, pair="p/v1", target="t").seen == set()
    assert (tmp_path / "monitor.unreadable").exists() and not path.exists()


def test_requests_without_proposals_say_nothing_of_acceptance() -> None:
    from dataclasses import replace

    state = State("p/v1", "t")
    observe(state, [replace(served(1, "code", 0.5), proposed=[], accepted=[])], PUBLISHED, CFG)
    assert state.strata == {}


def test_traffic_that_was_never_scored_is_counted_and_said() -> None:
    state = State("p/v1", "t")
    observe(state, [served(i, "law", 0.1) for i in range(5)], PUBLISHED, CFG)
    assert state.strata == {} and state.unscored == {"law, greedy": 5}


def test_few_scored_prompts_give_a_careful_reference() -> None:
    """In 200 scores of six prompts, hardly a reference is above the truth; one standard error would be in a sixth."""
    rng = random.Random(1)
    above = plain = 0
    for _ in range(200):
        rates = [min(1.0, max(0.0, rng.gauss(0.7, 0.15))) for _ in range(6)]
        above += _lower_end(rates, level=0.05) > 0.7
        mean = sum(rates) / 6
        plain += mean - (sum((r - mean) ** 2 for r in rates) / 5 / 6) ** 0.5 > 0.7
    assert above <= 20 < plain
    assert _lower_end([0.9], level=0.05) == 0.0


def test_quantiles_of_t_are_those_of_the_tables() -> None:
    from scipy.stats import t

    for freedom in (1, 2, 3, 5, 11, 40):
        for level in (0.95, 0.99, 0.995):
            assert _t_quantile(level, freedom) == pytest.approx(float(t.ppf(level, freedom)), rel=0.01)


def test_the_interval_covers_the_mean() -> None:
    state = State("p/v1", "t")
    observe(state, traffic(400, code_share=1.0), PUBLISHED, CFG)
    low, high = interval(state.strata["code, greedy"])
    assert low < 0.7 < high and high - low < 0.2


def test_fingerprints_follow_the_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("a")
    before = fingerprints(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("b")
    after = fingerprints(tmp_path)
    assert before["tokenizer"] == after["tokenizer"] and before["chat_template"] != after["chat_template"]
