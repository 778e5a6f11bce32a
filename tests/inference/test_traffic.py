"""Requests are logged whole or not at all, in bounded space; samples know everyone whatever was dropped or killed."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.lookahead.fixed import FixedLookahead
from inference.pair import Pair
from inference.request import Decoded
from inference.traffic import (
    TrafficConfig,
    TrafficLog,
    TrafficRecord,
    hard_sample,
    read_traffic,
    record_from,
    text_digest,
    uniform_sample,
)
from inference.traffic.segments import Counts, segment_paths
from tests.pipelines.tiny import write_model

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "the launch code is 0000"


def record(name: str, *, stood: int = 3, **changes: Any) -> TrafficRecord:
    messages = [{"role": "user", "content": SECRET}]
    whole = TrafficRecord(
        id=name,
        time=1000.5,
        pair="tiny/v1",
        target="ab" * 32,
        arm="lookup",
        domain="chat",
        temperature=0.0,
        prompt=messages,
        prompt_digest=text_digest(messages),
        response=f"answer: {SECRET}",
        response_digest=text_digest(f"answer: {SECRET}"),
        emitted=stood + 4,
        passes=4,
        proposed=[4, 2],
        accepted=[min(stood, 2), max(0, stood - 2)],
        seconds=0.25,
    )
    return replace(whole, **changes)


LINE = len(record("r00000").to_json()) + 1
"""Bytes of a line whose id has six characters."""


def config(lines: float = 4, segments: float = 3, **changes: Any) -> TrafficConfig:
    """Segments of so many lines, and room for so many segments."""
    size = int(lines * LINE) / 1e6
    return TrafficConfig(**{"segment_mb": size, "max_mb": size * segments, **changes})


def names(records: list[TrafficRecord]) -> list[str]:
    return [found.id for found in records]


def fill(folder: Path, count: int, settings: TrafficConfig, *, start: int = 0) -> None:
    log = TrafficLog(folder, config=settings)
    for number in range(start, start + count):
        log.append(record(f"r{number:05d}", stood=number * 7 % 4))
    assert log.lost == 0


def test_what_is_appended_is_read_back_oldest_first(tmp_path: Path) -> None:
    log = TrafficLog(tmp_path / "log")
    sent = [record("a"), record("b", prompt=None, response=None, domain=""), record("c", source="vllm", requests=9)]
    for one in sent:
        log.append(one)
    found = read_traffic(tmp_path / "log")
    assert found.records == sent
    assert (found.torn, found.newer, found.segments, found.dropped) == (0, 0, 1, 0)
    assert found.nbytes == sum(len(one.to_json()) + 1 for one in sent)


def test_rate_and_tau_are_of_chain_tokens_and_passes() -> None:
    assert record("a", stood=3).rate == 3 / 6
    assert record("a", stood=3).tau == 7 / 4
    assert record("a", proposed=[], accepted=[]).rate is None
    assert record("a", passes=0).tau is None


def test_a_last_line_torn_at_any_byte_is_cut_and_counted_for_good(tmp_path: Path) -> None:
    for cut in range(1, LINE + 1):
        folder = tmp_path / str(cut)
        log = TrafficLog(folder, config=config())
        log.append(record("r00000"))
        log.append(record("r00001"))
        (path,) = segment_paths(folder)
        with path.open("r+b") as handle:
            handle.truncate(2 * LINE - cut)
        # Without its line break alone a record is whole; without all its bytes there never was a line.
        torn, first = (1 if 1 < cut < LINE else 0), (["r00000", "r00001"] if cut == 1 else ["r00000"])
        assert (names(read_traffic(folder).records), read_traffic(folder).torn) == (first, torn), cut
        log.append(record("r00002"))  # a process that lives on
        TrafficLog(folder, config=config())
        for _ in range(2):
            found = read_traffic(folder)
            assert (names(found.records), found.torn) == ([*first, "r00002"], torn), cut
        assert path.read_bytes().endswith(b"\n") and path.stat().st_size == (len(first) + 1) * LINE


def test_opening_alone_repairs(tmp_path: Path) -> None:
    TrafficLog(tmp_path).append(record("r00000"))
    (path,) = segment_paths(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"torn')
    TrafficLog(tmp_path)
    assert path.stat().st_size == LINE
    assert Counts.read(tmp_path).cut == 1


@pytest.mark.parametrize("step", ["write", "ftruncate"])
def test_a_kill_between_counting_and_cutting_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    TrafficLog(tmp_path).append(record("r00000"))
    (path,) = segment_paths(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"torn')

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if step == "ftruncate":
            patch.setattr(os, "ftruncate", die)  # counted, not cut
        else:
            patch.setattr("inference.traffic.segments.Counts.write", die)  # neither
        TrafficLog(tmp_path)
    assert read_traffic(tmp_path).torn == 1
    TrafficLog(tmp_path)
    assert read_traffic(tmp_path).torn == 1
    path.write_bytes(path.read_bytes() + b'{"torn')  # once more, at the same place
    TrafficLog(tmp_path)
    assert read_traffic(tmp_path).torn == 2


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe not text",
        b"{}",
        b"[1]",
        b"",
        b'{"schema_version": 0}',
        json.dumps(json.loads(record("x").to_json()) | {"emitted": "many"}).encode(),
        json.dumps(json.loads(record("x").to_json()) | {"proposed": [1]}).encode(),
        json.dumps(json.loads(record("x").to_json()) | {"seconds": float("nan")}).encode(),
    ],
)
def test_a_damaged_line_in_the_middle_is_passed_over_counted_and_warned_of_once(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 3, config())
    (path,) = segment_paths(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, damage, *lines[1:], b""]))
    caplog.clear()
    found = read_traffic(tmp_path)
    assert (names(found.records), found.torn) == (["r00000", "r00001", "r00002"], 2)
    assert [entry.getMessage().partition(",")[0] for entry in caplog.records] == [
        "2 damaged lines and 0 of a newer schema passed over"
    ]


def test_damaged_lines_are_still_counted_when_their_segment_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path, 4, config())
    path = segment_paths(tmp_path)[0]
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"x" * (LINE - 1), *lines[2:], b""]))
    fill(tmp_path, 12, config(), start=4)
    found = read_traffic(tmp_path)
    assert not path.exists()
    assert (found.torn, found.dropped, len(found.records)) == (1, 3, 12)


def test_segments_rotate_and_never_outgrow_their_bound(tmp_path: Path) -> None:
    settings = config(lines=4, segments=3)
    log = TrafficLog(tmp_path, config=settings)
    most = 0
    for number in range(60):
        log.append(record(f"r{number:05d}"))
        sizes = [path.stat().st_size for path in segment_paths(tmp_path)]
        assert max(sizes) <= settings.segment_bytes and sum(sizes) <= settings.max_bytes
        most = max(most, len(sizes))
    assert most == 3
    found = read_traffic(tmp_path)
    assert names(found.records) == [f"r{number:05d}" for number in range(60 - len(found.records), 60)]
    assert 8 <= len(found.records) <= 12 and len(found.records) + found.dropped == 60
    assert [path.name for path in segment_paths(tmp_path)][-1] == "traffic-000015.jsonl"


def test_one_segment_is_room_enough_and_numbers_are_never_used_again(tmp_path: Path) -> None:
    fill(tmp_path, 9, config(lines=4, segments=1))
    assert [path.name for path in segment_paths(tmp_path)] == ["traffic-000003.jsonl"]
    assert names(read_traffic(tmp_path).records) == ["r00008"]


def test_a_record_longer_than_a_segment_is_kept_without_its_texts(tmp_path: Path) -> None:
    settings = config(lines=2)
    TrafficLog(tmp_path, config=settings).append(record("r00000", response="x" * 2 * LINE))
    (found,) = read_traffic(tmp_path).records
    assert (found.prompt, found.response) == (None, None)
    assert found.prompt_digest == record("r00000").prompt_digest


def test_the_uniform_sample_does_not_depend_on_rotation(tmp_path: Path) -> None:
    fill(tmp_path / "all", 80, TrafficConfig())
    expected = names(uniform_sample(tmp_path / "all", 10))
    assert len(set(expected)) == 10 and expected != sorted(expected)
    for lines, segments in [(1, 1), (4, 1), (4, 3), (7, 2), (30, 2)]:
        folder = tmp_path / f"{lines}-{segments}"
        fill(folder, 80, config(lines, segments, reservoir=10, hard=10))
        assert read_traffic(folder).dropped > 0
        assert names(uniform_sample(folder, 10)) == expected
        assert names(uniform_sample(folder, 4)) == expected[:4]


def test_the_hard_sample_is_of_the_lowest_acceptance_ever(tmp_path: Path) -> None:
    fill(tmp_path / "all", 80, TrafficConfig())
    expected = hard_sample(tmp_path / "all", 30)
    assert [found.rate for found in expected] == [0.0] * 20 + [1 / 6] * 10  # rates go 0, 3/6, 2/6, 1/6 in turn
    fill(tmp_path / "small", 80, config(4, 2, hard=30))
    assert names(hard_sample(tmp_path / "small", 30)) == names(expected)


def test_what_verified_nothing_and_intervals_of_engines_are_no_hard_requests(tmp_path: Path) -> None:
    log = TrafficLog(tmp_path)
    log.append(record("nothing", proposed=[], accepted=[]))
    log.append(record("interval", stood=0, source="vllm", requests=50))
    log.append(record("one"))
    assert names(hard_sample(tmp_path, 5)) == ["one"]
    assert sorted(names(uniform_sample(tmp_path, 5))) == ["nothing", "one"]


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("seed", [0, 1])  # the log's own seed is 0: another one chooses from what is known
def test_the_sample_is_uniform_whatever_was_dropped(tmp_path: Path, dropping: bool, seed: int) -> None:
    # 60 logs of 40 requests; 8 of 40 drawn by position in time, in 8 bins of 5: 60 draws a bin are expected.
    bins = [0] * 8
    for trial in range(60):
        folder = tmp_path / str(trial)
        settings = config(5, 2, reservoir=8, hard=0) if dropping else TrafficConfig()
        log = TrafficLog(folder, config=settings)
        for number in range(40):
            log.append(record(f"{trial:03d}-{number:02d}"))
        drawn = uniform_sample(folder, 8, seed=seed)
        assert len(drawn) == 8
        for found in drawn:
            bins[int(found.id[4:]) // 5] += 1
    # Draws without replacement vary less than independent ones, so that this errs on the quiet side.
    assert sum((count - 60) ** 2 / 60 for count in bins) < chi2.ppf(0.999, df=7)


def test_a_smaller_reservoir_gives_no_more_than_is_uniform(tmp_path: Path) -> None:
    fill(tmp_path, 80, config(4, 2, reservoir=5))
    limited = uniform_sample(tmp_path, 60)
    fill(tmp_path / "all", 80, TrafficConfig())
    everyone = uniform_sample(tmp_path / "all", 60)
    assert 5 <= len(limited) < 12
    assert names(limited) == names(everyone)[: len(limited)]


def test_a_reservoir_that_was_made_larger_stays_true(tmp_path: Path) -> None:
    fill(tmp_path, 40, config(4, 2, reservoir=5))
    fill(tmp_path, 40, config(4, 2, reservoir=40), start=40)
    fill(tmp_path / "all", 80, TrafficConfig())
    limited = names(uniform_sample(tmp_path, 80))
    assert limited == names(uniform_sample(tmp_path / "all", 80))[: len(limited)] and len(limited) >= 5


class Killed(BaseException):
    """A kill in the middle of things: nothing that catches exceptions sees it."""


STEPS = ["replace", "fsync", "unlink", "ftruncate", "write"]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Callable[[], int]]]:
    """Makes the process die at its n-th step that touches the disk; tells how many steps were made."""

    def arm(step: int) -> Callable[[], int]:
        made = 0

        def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal made
                made += 1
                if made == step:
                    raise Killed
                return real(*args, **options)

            return call

        for name in STEPS:
            monkeypatch.setattr(os, name, wrap(getattr(os, name)))
        monkeypatch.setattr(Path, "unlink", wrap(Path.unlink))
        return lambda: made

    yield arm


@pytest.mark.parametrize("step", range(1, 18))
def test_a_kill_at_any_step_of_dropping_loses_nothing_and_doubles_nothing(
    tmp_path: Path, dying: Callable[[int], Callable[[], int]], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = config(4, 2, reservoir=6, hard=6)
    fill(tmp_path / "log", 12, settings)  # 2 segments, both full; one was dropped
    fill(tmp_path / "all", 13, TrafficConfig())
    log = TrafficLog(tmp_path / "log", config=settings)
    dying(step)
    try:
        log.append(record("r00012", stood=12 * 7 % 4))
        finished = True
    except Killed:
        finished = False
    monkeypatch.undo()
    # As it was left, 12 or 13 requests are known, each once.
    found = read_traffic(tmp_path / "log")
    assert len(set(names(found.records))) == len(found.records)
    assert len(found.records) + found.dropped in ((13,) if finished else (12, 13))
    expected = names(uniform_sample(tmp_path / "all", 13))
    if found.records[-1].id != "r00012":
        fill(tmp_path / "log", 1, settings, start=12)
        found = read_traffic(tmp_path / "log")
    assert len(found.records) + found.dropped == 13 and found.torn == 0
    assert names(uniform_sample(tmp_path / "log", 6)) == expected[:6]
    assert names(hard_sample(tmp_path / "log", 6)) == names(hard_sample(tmp_path / "all", 6))
    assert len(segment_paths(tmp_path / "log")) == 2


def test_the_steps_that_are_killed_are_all_there_are(
    tmp_path: Path, dying: Callable[[int], Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 12, config(4, 2, reservoir=6, hard=6))
    made = dying(0)
    TrafficLog(tmp_path, config=config(4, 2, reservoir=6, hard=6)).append(record("r00012"))
    monkeypatch.undo()
    assert 8 < made() < 18


WRITER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.inference.test_traffic import config, record
from inference.traffic import TrafficLog
log = TrafficLog(Path(sys.argv[1]), config=config(int(sys.argv[4]), int(sys.argv[5]), reservoir=20))
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
for number in range(int(sys.argv[3])):
    log.append(record(f"{{sys.argv[2]}}{{number:05d}}"))
sys.exit(log.lost)
"""


def _writer(folder: Path, name: str, count: int, *, lines: int = 40, segments: int = 200) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count), str(lines), str(segments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_processes_that_append_at_once_lose_nothing_even_when_one_is_killed(tmp_path: Path) -> None:
    with _writer(tmp_path, "a", 400) as first, _writer(tmp_path, "b", 400) as second:
        with _writer(tmp_path, "c", 100000) as third:
            for process in (first, second, third):
                _go(process)
            assert (first.wait(120), second.wait(120)) == (0, 0)
            third.send_signal(signal.SIGKILL)
    TrafficLog(tmp_path, config=config(40, 200))
    found = read_traffic(tmp_path)
    for letter in "ab":
        mine = [name for name in names(found.records) if name[0] == letter]
        assert mine == [f"{letter}{number:05d}" for number in range(400)]
    killed = [name for name in names(found.records) if name[0] == "c"]
    assert killed == [f"c{number:05d}" for number in range(len(killed))]
    assert found.torn <= 1 and found.segments > 3


def test_processes_that_drop_at_once_count_and_sample_everyone_once(tmp_path: Path) -> None:
    room = {"lines": 5, "segments": 2}
    with _writer(tmp_path, "a", 200, **room) as first, _writer(tmp_path, "b", 200, **room) as second:
        for process in (first, second):
            _go(process)
        assert (first.wait(120), second.wait(120)) == (0, 0)
    found = read_traffic(tmp_path)
    assert len(found.records) + found.dropped == 400 and found.torn == 0
    assert found.nbytes <= config(**room).max_bytes
    log = TrafficLog(tmp_path / "all")
    for letter in "ab":
        for number in range(200):
            log.append(record(f"{letter}{number:05d}"))
    assert names(uniform_sample(tmp_path, 20)) == names(uniform_sample(tmp_path / "all", 20))


@pytest.mark.parametrize(
    ("settings", "prompt", "digest"),
    [({"text": "hash"}, False, True), ({"text": "drop"}, False, False), ({"text_share": 0.0}, False, True)],
)
def test_private_modes_leave_no_text_in_any_file(
    tmp_path: Path, settings: dict[str, Any], prompt: bool, digest: bool
) -> None:
    fill(tmp_path, 40, config(4, 2, **settings))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"reservoir.jsonl", "hard.jsonl", "counts.json"} <= {path.name for path in files}
    assert not any(b"launch code" in path.read_bytes() for path in files)
    hashed = record("r00000").prompt_digest.encode()
    assert any(hashed in path.read_bytes() for path in files) == digest
    assert all(bool(found.response_digest) == digest for found in read_traffic(tmp_path).records)


def test_a_share_of_the_requests_keeps_its_texts_and_ids_decide(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        fill(tmp_path / folder, 400, TrafficConfig(text_share=0.25))
    kept = [found.id for found in read_traffic(tmp_path / "one").records if found.prompt is not None]
    assert kept == [found.id for found in read_traffic(tmp_path / "two").records if found.prompt is not None]
    assert 65 < len(kept) < 135  # 100 expected, 4 standard deviations are 35


@pytest.mark.parametrize("written", [None, 0, 10])
def test_a_full_disk_never_stops_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, written: int | None
) -> None:
    log = TrafficLog(tmp_path, config=config())
    log.append(record("r00000"))
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:written])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for number in (1, 2, 3):
            log.append(record(f"r{number:05d}"))
    assert log.lost == 3
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    log.append(record("r00004"))
    found = read_traffic(tmp_path)
    assert (names(found.records), found.torn, log.lost) == (["r00000", "r00004"], 0, 3)


def test_samples_that_cannot_be_written_keep_their_segment_and_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(4, 2)
    fill(tmp_path, 8, settings)
    log = TrafficLog(tmp_path, config=settings)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for number in range(8, 12):
            log.append(record(f"r{number:05d}"))
    found = read_traffic(tmp_path)
    assert log.lost == 4 and len(found.records) == 8 and found.nbytes <= settings.max_bytes
    assert not list(tmp_path.glob("*.aside"))
    log.append(record("r00012"))
    assert log.lost == 4 and read_traffic(tmp_path).dropped == 4


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"no traffic log can be kept here .*file/log\]: choose a folder"):
        TrafficLog(tmp_path / "file" / "log")


def test_reading_where_there_is_no_log_is_refused(tmp_path: Path) -> None:
    for read in (read_traffic, lambda folder: uniform_sample(folder, 3), lambda folder: hard_sample(folder, 3)):
        with pytest.raises(InputError, match="no traffic log here"):
            read(tmp_path / "nowhere")
    assert read_traffic(tmp_path).records == []


def _newer(path: Path, *, lines: slice) -> None:
    found = path.read_text().splitlines()
    found[lines] = [line.replace('"schema_version": 1', '"schema_version": 2') for line in found[lines]]
    path.write_text("".join(f"{line}\n" for line in found))


def test_a_newer_schema_is_refused_where_it_is_all_there_is(tmp_path: Path) -> None:
    fill(tmp_path, 3, config())
    (path,) = segment_paths(tmp_path)
    _newer(path, lines=slice(1, 2))
    found = read_traffic(tmp_path)
    assert (names(found.records), found.newer, found.torn) == (["r00000", "r00002"], 1, 0)
    _newer(path, lines=slice(None))
    with pytest.raises(InputError, match=r"this log has schema 2, this code reads 1 .*: use a matching version"):
        read_traffic(tmp_path)
    with pytest.raises(InputError, match=r"this log has schema 2, this code reads 1 .*or another folder"):
        TrafficLog(tmp_path, config=config())


def test_keys_that_are_not_known_are_passed_over() -> None:
    data = json.loads(record("a").to_json())
    assert TrafficRecord.from_json(json.dumps(data | {"colour": "red"})) == record("a")
    del data["source"], data["requests"]
    assert TrafficRecord.from_json(json.dumps(data)) == record("a")


@pytest.mark.parametrize("name", ["reservoir.jsonl", "hard.jsonl"])
def test_a_damaged_sample_is_said_and_stops_no_serving(tmp_path: Path, name: str) -> None:
    fill(tmp_path, 12, config(4, 2))
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(InputError, match=r"the sample is damaged .*: move it away"):
        (uniform_sample if name == "reservoir.jsonl" else hard_sample)(tmp_path, 3)
    log = TrafficLog(tmp_path, config=config(4, 2))
    log.append(record("r00099"))
    assert log.lost == 1


def test_damaged_counts_start_anew(tmp_path: Path) -> None:
    fill(tmp_path, 3, config())
    (tmp_path / "counts.json").write_text("[")
    fill(tmp_path, 1, config(), start=3)
    assert len(read_traffic(tmp_path).records) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_mb": 0.0}, "segment_mb is 0.0"),
        ({"segment_mb": 20.0, "max_mb": 10.0}, "max_mb is 10.0"),
        ({"segment_mb": 1.0, "max_mb": 1000.0}, "use 1 to 256 segments"),
        ({"text": "some"}, "text is 'some'; use keep, hash or drop"),
        ({"text_share": 1.5}, "text_share is 1.5"),
        ({"reservoir": -1}, "reservoir is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrafficConfig(**settings)


def test_a_negative_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is -1"):
        uniform_sample(tmp_path, -1)


def test_a_request_that_was_decoded_becomes_a_record() -> None:
    decoded = Decoded(tokens=[1, 2, 3], passes=2, proposed=[2, 1], accepted=[1, 0], seconds={"verify": 0.5})
    found = record_from(
        decoded,
        request_id="r1",
        pair="tiny/v1",
        target="ab",
        arm="lookup",
        domain="chat",
        temperature=1,
        prompt="hi",
        response="there",
        at=5.0,
    )
    assert (found.emitted, found.passes, found.rate, found.tau) == (3, 2, 1 / 3, 1.5)
    assert (found.time, found.seconds, found.prompt) == (5.0, 0.5, [{"role": "user", "content": "hi"}])
    assert found.prompt_digest == text_digest([{"content": "hi", "role": "user"}]) != text_digest("hi")
    assert TrafficRecord.from_json(found.to_json()) == found


def test_a_pair_logs_what_it_answers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "target", layers=1)
    model = load_causal_model(folder, precision="fp32", device=torch.device("cpu"))
    info = {"name": "tiny", "version": "v3", "target": {"digest": "ab"}, "draft": {"name": "alone", "kind": "none"}}
    pair = Pair(info, model, NoDrafter(), FixedLookahead(0), "cd")
    log = TrafficLog(tmp_path / "log")
    answer = pair.generate("hello", max_new_tokens=5, traffic=log, domain="chat", request_id="r1")
    pair.generate([{"role": "user", "content": "hello"}], max_new_tokens=5, traffic=log)
    pair.generate("not logged", max_new_tokens=5)
    first, second = read_traffic(tmp_path / "log").records
    assert (first.id, first.pair, first.target, first.arm, first.domain) == ("r1", "tiny/v3", "cd", "alone", "chat")
    assert (first.response, first.emitted, first.rate) == (answer.text, len(answer.decoded.tokens), None)
    assert first.seconds == pytest.approx(answer.decoded.total_seconds, abs=1e-5)
    assert (second.prompt, second.prompt_digest, second.domain) == (first.prompt, first.prompt_digest, "")
    assert len(second.id) == 32
