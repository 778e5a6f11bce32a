"""Off a terminal a stage says how far it is at most once a second, and always at the end."""

import io
import logging
import sys

import pytest

from pipelines.progress import tracked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds shown to the module; each test moves them."""
    now = [0.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    return now


def test_items_come_in_order_and_lines_a_second_apart(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    seen = []
    for item in tracked(range(10), "corpus", unit="shards"):
        seen.append(item)
        clock[0] += 0.4
    assert seen == list(range(10))
    # Done after 0.4, 0.8, 1.2 ... 4.0 s: lines at 1.2, 2.4 and 3.6 s, and the last.
    assert caplog.messages == [
        "corpus: 3 of 10 shards, 3 s left",
        "corpus: 6 of 10 shards, 2 s left",
        "corpus: 9 of 10 shards, 0 s left",
        "corpus: 10 of 10 shards, 0 s left",
    ]


def test_quick_work_says_one_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    list(tracked(["a", "b"], "score", unit="prompts"))
    assert caplog.messages == ["score: 2 of 2 prompts, 0 s left"]


def test_no_work_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(tracked([], "score", unit="prompts")) == []
    assert caplog.messages == []


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level(logging.INFO)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(tracked([1, 2, 3], "corpus", unit="shards")) == [1, 2, 3]
    assert "corpus (shards)" in screen.getvalue()
    assert caplog.messages == []
