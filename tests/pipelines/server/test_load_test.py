"""The load tool: what it asks, what it measures, and that a wrong answer does not pass."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.server.load_test import Answered, Asked, Own, drive, figure, main, requests_of, serving, table
from tests.pipelines.server.serving import live, settings_for


def test_requests_are_seeded_and_use_every_question_before_any_comes_twice() -> None:
    asked = requests_of(30, temperatures=[0.0, 1.0], seed=1)
    assert asked == requests_of(30, temperatures=[0.0, 1.0], seed=1) != requests_of(30, temperatures=[0.0], seed=1)
    assert len({one.prompt for one in asked[:12]}) == 12
    assert {one.temperature for one in asked} == {0.0, 1.0}


def test_answers_of_a_server_are_compared_with_the_engine_alone(alias: Path) -> None:
    settings = settings_for(alias, token="")
    asked = requests_of(8, temperatures=[0.0, 1.0], seed=2)
    with live(settings) as here:
        answered, seconds = asyncio.run(drive(here.url, asked, clients=4, max_tokens=10))
        assert here.server.service.version is not None
        own = Own(here.server.service.version, max_tokens=10)
        found = figure("pair", 4, answered, seconds, own)
    assert (found.requests, found.equal, found.rounding, found.parted, found.unexplained) == (8, 8, 0, 0, 0)
    assert {one.asked for one in answered} == set(asked)
    assert all(0 < one.first_s <= one.whole_s <= seconds for one in answered)
    assert found.tokens_per_s == pytest.approx(sum(len(one.tokens) for one in answered) / seconds, abs=0.1)
    assert found.first_s[0] <= found.first_s[1] and "| 4 | pair | 8 |" in table([found])

    greedy = next(one for one in answered if one.asked.temperature == 0)
    sampled = next(one for one in answered if one.asked.temperature > 0)
    assert own.verdict(_spoilt(greedy)) == "unexplained"
    assert own.verdict(_spoilt(sampled)) == "parted"


def _spoilt(one: Answered) -> Answered:
    return replace(one, tokens=[(one.tokens[0] + 1) % 200, *one.tokens[1:]])


def test_a_seed_makes_no_difference_to_a_greedy_answer(alias: Path) -> None:
    from pipelines.server.versions import load_version

    own = Own(load_version(settings_for(alias).pair), max_tokens=5)
    assert own.tokens(Asked("hi", 0.0, 1)) is own.tokens(Asked("hi", 0.0, 2))


def test_a_server_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match=r"the server did not start .*--pair x"), serving(["--pair", "x"]):
        pass


@pytest.mark.slow
def test_the_tool_drives_real_processes(alias: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = f"--pair {alias} --cache {tmp_path} --device cpu --clients 1,3 --requests 3 --turns 1 --max-tokens 4"
    assert main([*words.split(), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("\n") == 6 and out.is_file()  # two lines of head, two arms at two loads
