"""`dspark serve` before it serves: its options, what it refuses, and the check of a pair."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.errors import InputError
from pipelines.server import command, running
from pipelines.server.auth import TOKEN_VARIABLE
from pipelines.server.settings import Limits, PairSettings, ServerSettings
from tests.pipelines.server.serving import Own, settings_for
from tests.pipelines.tiny import run


@pytest.fixture(autouse=True)
def loggers_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets up logging for a whole process."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    names = ("pipelines", "inference", "dspark.access", "uvicorn")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    yield
    for name, (handlers, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerSettings]:
    """Settings of servers that would have run."""
    found: list[ServerSettings] = []

    def note(settings: ServerSettings) -> int:
        found.append(settings)
        return 143

    monkeypatch.setattr(running, "serve", note)
    return found


def test_a_check_answers_one_prompt(alias: Path, own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    cache = alias.parent.parent / "cache"
    assert command.main(["--pair", str(alias), "--device", "cpu", "--cache", str(cache), "--check"]) == 0
    said = capsys.readouterr()
    expected = own.tokens(own.prompt("Why is the sky blue?"), max_tokens=32, temperature=0.0)
    assert said.out == own.text(expected) + "\n"
    assert "tiny/v1" in said.err


def test_words_become_settings(served: list[ServerSettings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    words = "--pair p --lookahead 2 --max-requests 3 --max-waiting 4 --max-tokens 5 --max-body-kib 6 --timeout 7"
    more = f"--port 9 --host 0.0.0.0 --traffic {tmp_path} --traffic-text drop --drain-seconds 8 --watch-seconds 0"
    assert command.main([*words.split(), *more.split()]) == 143
    [settings] = served
    assert settings.pair == PairSettings(folder=Path("p"), cache=settings.pair.cache, lookahead=2, max_requests=3)
    assert settings.limits == Limits(
        max_waiting=4, max_tokens=5, max_body_bytes=6 * 1024, timeout_s=7.0, drain_s=8.0, watch_s=0.0
    )
    assert (settings.host, settings.port, settings.token, settings.traffic) == ("0.0.0.0", 9, "secret", tmp_path)
    assert settings.traffic_config is not None and settings.traffic_config.text == "drop"
    assert "secret" not in repr(settings)


def test_no_one_listens_to_the_world_without_a_token(served: list[ServerSettings]) -> None:
    with pytest.raises(InputError, match=r"0\.0\.0\.0 without a token lets anyone in .*: set DSPARK_API_KEY"):
        command.main(["--pair", "p", "--host", "0.0.0.0"])
    assert command.main(["--pair", "p", "--host", "0.0.0.0", "--no-auth"]) == 143
    assert command.main(["--pair", "p"]) == 143
    assert [settings.token for settings in served] == ["", ""]


@pytest.mark.parametrize("token", ["two words", "caf\u00e9", "line\nend"])
def test_a_token_that_no_header_carries_is_refused(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(InputError, match="the token holds blanks") as caught:
        command.main(["--pair", "p"])
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-requests", "0"], "max_requests is 0"),
        (["--lookahead", "-1"], "lookahead is -1"),
        (["--max-cache-tokens", "0"], "max_cache_tokens is 0"),
        (["--max-waiting", "-1"], "max_waiting, .* are 0 or more"),
        (["--max-tokens", "0"], "max_tokens and max_body_bytes are at least 1"),
        (["--timeout", "0"], "timeout_s and slow_reader_s are above 0, and all times are finite"),
        (["--timeout", "nan"], "timeout_s and slow_reader_s are above 0, and all times are finite"),
    ],
)
def test_settings_out_of_range_are_one_line_and_code_2(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command.main(["--pair", "p", *words])
    said, code = run(["serve", "--pair", "p", *words])
    assert code == 2 and said.startswith("dspark: ") and said.count("\n") == 1


def test_a_port_that_is_taken_is_said_in_one_line(alias: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = settings_for(alias, port=taken.getsockname()[1])
        with pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1, port"):
            running.listening(settings)


def test_lookahead_0_decodes_with_the_target_alone(alias: Path, own: Own) -> None:
    alone = Own(settings_for(alias, lookahead=0))
    handle_tokens = alone.tokens(own.prompt("hi"), max_tokens=20, temperature=0.0)
    assert handle_tokens == own.tokens(own.prompt("hi"), max_tokens=20, temperature=0.0)
    assert alone.version.engine.lookahead.longest == 0


_COSTS = {"passes": {"1": {"1": 1.0, "2": 1.1}}, "drafts": {"1": [0.1, 0.1]}, "spread": {"1": {"1": 0.0, "2": 0.0}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no costs under load here"),
        ("{", "no costs under load here"),
        ("[]", "no costs under load in fp32"),
        (json.dumps({"bf16": _COSTS}), "no costs under load in fp32"),
        (json.dumps({"fp32": {}}), "the costs under load are off"),
    ],
)
def test_costs_under_load_that_are_none_are_refused(
    alias: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "load_costs.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Own(settings_for(alias, load_costs=file))


def test_costs_under_load_change_no_answer(alias: Path, own: Own, tmp_path: Path) -> None:
    file = tmp_path / "load_costs.json"
    file.write_text(json.dumps({"fp32": _COSTS}), encoding="utf-8")
    weighing = Own(settings_for(alias, load_costs=file))
    prompt = own.prompt("hi")
    assert weighing.tokens(prompt, max_tokens=20, temperature=0.0) == own.tokens(prompt, max_tokens=20, temperature=0.0)
