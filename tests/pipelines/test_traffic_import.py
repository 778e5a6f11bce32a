"""Counters of serving engines become intervals in the log, across restarts, and the log can be shown."""

import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from inference.errors import InputError
from inference.traffic import TrafficLog, TrafficRecord, hard_sample, read_traffic, uniform_sample
from pipelines.traffic_counters import records_of
from pipelines.traffic_import import main, summary
from pipelines.traffic_scrapes import Scrape, parse_scrape

VLLM = """\
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds {start}
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} 2.0
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {drafts}
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{{engine="0",model_name="m"}} 1.7612e+09
# HELP vllm:spec_decode_num_draft_tokens_total Number of draft tokens.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {drafted}
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {accepted}
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="0"}} {pos[0]}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="1"}} {pos[1]}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="2"}} {pos[2]}
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {generated}
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{{engine="0",finished_reason="stop",model_name="m"}} {stopped}
vllm:request_success_total{{engine="0",finished_reason="length",model_name="m"}} 1.0
# HELP vllm:time_to_first_token_seconds Histogram of time to first token in seconds.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="m"}} 3.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} 5.0
vllm:time_to_first_token_seconds_count{{engine="0",model_name="m"}} 5.0
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="m"}} 0.7
"""
SGLANG = """\
# HELP sglang:generation_tokens_total Number of generation tokens processed.
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{{model_name="m"}} {generated}
# HELP sglang:num_requests_total Number of requests processed.
# TYPE sglang:num_requests_total counter
sglang:num_requests_total{{model_name="m"}} {requests}
# HELP sglang:spec_accept_length The average acceptance length of speculative decoding.
# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{{engine_type="unified",model_name="m",tp_rank="0"}} {length}
# HELP sglang:spec_accept_rate The average acceptance rate of speculative decoding.
# TYPE sglang:spec_accept_rate gauge
sglang:spec_accept_rate{{engine_type="unified",model_name="m",tp_rank="0"}} {rate}
"""
CALLS = """\
# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{{model_name="m"}} {calls}
"""


def vllm(scale: float, *, start: float = 1.7e9, engine: str = "0") -> str:
    """Totals at `scale` = 1: 100 drafts of 3, of which 80, 60 and 30 stood; 280 tokens, 10 of them first ones."""
    text = VLLM.format(
        start=start,
        drafts=100.0 * scale,
        drafted=300.0 * scale,
        accepted=170.0 * scale,
        pos=[80.0 * scale, 60.0 * scale, 30.0 * scale],
        generated=280.0 * scale,
        stopped=10.0 * scale,
    )
    return text.replace('engine="0"', f'engine="{engine}"')


def sglang(scale: float, *, length: float = 2.5, rate: float = 0.5, calls: float | None = None) -> str:
    """Totals at `scale` = 1: 1010 tokens of 10 requests."""
    text = SGLANG.format(generated=1010.0 * scale, requests=10.0 * scale, length=length, rate=rate)
    return text + ("" if calls is None else CALLS.format(calls=calls))


def scrape(text: str, *, at: float = 0.0, model: str | None = None) -> Scrape:
    return parse_scrape(text, where=f"scrape at {at:g}", at=at, model=model)


def records(*texts: str, engine: str = "vllm") -> list[TrafficRecord]:
    found = [scrape(text, at=60.0 * number) for number, text in enumerate(texts)]
    return records_of(found, engine=engine, pair="tiny/v1", target="ab", domain="chat", temperature=0.5)


def test_two_scrapes_of_vllm_make_an_interval_by_position() -> None:
    (found,) = records(vllm(1), vllm(3))
    # 200 drafts: position 2 was verified where position 1 stood, and so on. 560 - 340 tokens were the target's own.
    assert (found.proposed, found.accepted) == ([200, 160, 120], [160, 120, 60])
    assert (found.emitted, found.passes, found.requests) == (560, 220, 20)
    assert found.rate == 340 / 480 and found.tau == 560 / 220
    assert (found.source, found.arm, found.time, found.seconds) == ("vllm", "vllm", 60.0, 60.0)
    assert (found.pair, found.target, found.domain, found.temperature) == ("tiny/v1", "ab", "chat", 0.5)
    assert (found.prompt, found.response, found.prompt_digest, found.response_digest) == (None, None, "", "")


def test_a_series_makes_an_interval_of_each_two_and_idle_ones_are_left_out() -> None:
    found = records(vllm(1), vllm(2), vllm(2), vllm(5))
    assert [(one.time, one.proposed[0]) for one in found] == [(60.0, 100), (180.0, 300)]
    assert len({one.id for one in found}) == 2


def test_names_without_total_are_the_same_counters_and_both_count_once() -> None:
    def bare(scale: float) -> str:
        lines = vllm(scale).replace("_total", "").splitlines()
        return "\n".join(line for line in lines if not line.startswith("#")) + "\n"

    (expected,) = records(vllm(1), vllm(3))
    (found,) = records(bare(1), bare(3))
    assert (found.proposed, found.accepted, found.emitted) == (expected.proposed, expected.accepted, expected.emitted)
    (found,) = records(vllm(1) + bare(1), vllm(3) + bare(3))
    assert (found.proposed, found.accepted, found.emitted) == (expected.proposed, expected.accepted, expected.emitted)


def test_engines_of_one_server_are_summed() -> None:
    # Comments once a metric: the second engine's are series of the same families.
    def second(scale: float) -> str:
        lines = vllm(scale, engine="1").splitlines()
        return "\n".join(line for line in lines if line.startswith("vllm:")) + "\n"

    (found,) = records(vllm(1) + second(1), vllm(3) + second(2))
    assert (found.proposed, found.accepted) == ([300, 240, 180], [240, 180, 90])


def test_vllm_without_positions_has_one_for_all_drafted_tokens() -> None:
    def bare(scale: float) -> str:
        return "\n".join(line for line in vllm(scale).splitlines() if "per_pos" not in line) + "\n"

    (found,) = records(bare(1), bare(3))
    assert (found.proposed, found.accepted, found.passes) == ([600], [340], 220)


def test_vllm_without_a_count_of_tokens_takes_those_of_drafts() -> None:
    def bare(scale: float) -> str:
        return "\n".join(line for line in vllm(scale).splitlines() if "generation_tokens" not in line) + "\n"

    (found,) = records(bare(1), bare(3))
    assert (found.emitted, found.passes, found.tau) == (540, 200, 2.7)  # vLLM's own mean length, 1 + 340 / 200


def test_a_counter_that_fell_shows_a_restart_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    before, middle, after = records(vllm(5), vllm(7), vllm(1), vllm(2))
    assert (before.proposed[0], middle.proposed[0], after.proposed[0]) == (200, 100, 100)
    assert middle.accepted == [80, 60, 30] and middle.requests == 11
    said = [entry.getMessage() for entry in caplog.records]
    assert said == [
        "the server was restarted between scrape at 60 and scrape at 120: only what it counted since then is taken"
    ]


def test_a_restart_that_has_overtaken_the_counters_shows_by_its_start(caplog: pytest.LogCaptureFixture) -> None:
    (found,) = records(vllm(1, start=1.7e9), vllm(3, start=1.7e9 + 30))
    assert found.proposed[0] == 300 and "restarted" in caplog.text
    caplog.clear()
    (found,) = records(vllm(1, start=1.7e9), vllm(3, start=1.7e9 + 0.5))
    assert found.proposed[0] == 200 and "restarted" not in caplog.text


def test_sglang_counts_verifications_where_the_server_does() -> None:
    (found,) = records(sglang(1, calls=400.0), sglang(2, calls=800.0), engine="sglang")
    # 1000 tokens came from 400 verifications: 600 were drafted. At a rate of 0.5, 1200 were proposed.
    assert (found.emitted, found.requests, found.accepted, found.proposed) == (1010, 10, [600], [1200])
    assert found.passes == 410 and found.source == "sglang"


def test_sglang_without_that_count_reckons_it_from_the_mean_length() -> None:
    (found,) = records(sglang(1, length=9.0, rate=0.9), sglang(2, length=4.0, rate=0.6), engine="sglang")
    # 1000 / 4 = 250 verifications, 750 tokens accepted of 1250: gauges are the later scrape's.
    assert (found.accepted, found.proposed, found.passes) == ([750], [1250], 260)


def test_sglang_of_which_nothing_is_accepted_has_a_rate_of_zero() -> None:
    (found,) = records(sglang(1), sglang(2, length=1.0, rate=0.0), engine="sglang")
    assert (found.rate, found.emitted, found.passes) == (0.0, 1010, 1010)


def test_sglang_before_its_gauges_are_set_has_no_rate() -> None:
    (found,) = records(sglang(1), sglang(2, length=0.0, rate=0.0), engine="sglang")
    assert (found.rate, found.emitted) == (None, 1010)


def test_sglang_restarts_are_seen() -> None:
    (found,) = records(sglang(3), sglang(1), engine="sglang")
    assert (found.emitted, found.requests) == (1010, 10)


@pytest.mark.parametrize(
    ("engine", "text", "mend"),
    [
        ("vllm", sglang(1), "start the server with --speculative-config"),
        ("sglang", vllm(1), "start the server with --enable-metrics and a --speculative-algorithm"),
        ("vllm", "", "start the server with"),
    ],
)
def test_a_server_that_does_not_speculate_is_refused(engine: str, text: str, mend: str) -> None:
    with pytest.raises(InputError, match=rf"no metrics of {engine} on speculative decoding \[scrape at 60\]: {mend}"):
        records(text, text, engine=engine)


@pytest.mark.parametrize("text", ["<html>not found</html>", 'vllm:x{engine="0 5.0', "vllm:x{} many"])
def test_what_is_no_prometheus_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"this is no Prometheus text .*: save what /metrics answers"):
        scrape(text)


def test_of_several_models_one_must_be_chosen() -> None:
    def both(scale: float) -> str:
        return vllm(scale) + 'vllm:generation_tokens_total{engine="0",model_name="other"} 77.0\n'

    with pytest.raises(InputError, match=r"metrics of several models: m, other .*: give --model"):
        scrape(both(1))
    with pytest.raises(InputError, match=r"no metrics of model 'third' .*: it has m, other"):
        scrape(both(1), model="third")
    assert scrape(both(1), model="m").total("vllm:generation_tokens") == 280.0


def test_one_scrape_or_a_wrong_order_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 scrape\(s\) make no interval"):
        records(vllm(1))
    late, early = scrape(vllm(1), at=9.0), scrape(vllm(2), at=3.0)
    with pytest.raises(InputError, match=r"scrape at 3 is older than scrape at 9 .*: give the scrapes oldest first"):
        records_of([late, early], engine="vllm", pair="tiny/v1", target="ab")


def saved(folder: Path, name: str, text: str, *, at: float) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    os.utime(path, (at, at))
    return str(path)


def words(folder: Path, *sources: str, engine: str = "vllm") -> list[str]:
    given = [word for source in sources for word in ("--from", source)]
    log = ["--log", str(folder / "log"), "--pair", "tiny/v1", "--target-digest", "ab", "--every", "0"]
    return ["import", "--engine", engine, *given, *log]


def test_files_are_imported_once_however_often_it_is_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sources = [saved(tmp_path, f"{n}.txt", vllm(n), at=1000.0 + n) for n in (1, 2, 4)]
    assert main(words(tmp_path, *sources[:2])) == 0
    assert main(words(tmp_path, *sources)) == 0
    found = read_traffic(tmp_path / "log").records
    assert [(one.time, one.proposed[0], one.temperature) for one in found] == [(1002.0, 100, -1.0), (1004.0, 200, -1.0)]
    assert "1 intervals imported, 1 were there already" in caplog.text
    assert (uniform_sample(tmp_path / "log", 5), hard_sample(tmp_path / "log", 5)) == ([], [])


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server whose `/metrics` answers the texts of a list one after the other, then nothing more."""
    texts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/metrics" and bool(texts)
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(texts.pop(0).encode() if known else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", texts
        http.shutdown()
        thread.join()


def test_a_server_is_scraped_itself(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    url, texts = server
    texts += [vllm(1), vllm(3)]
    assert main(words(tmp_path, url, f"{url}/metrics")) == 0
    (found,) = read_traffic(tmp_path / "log").records
    assert found.proposed == [200, 160, 120]


def test_a_server_that_gives_no_metrics_is_refused(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    with pytest.raises(InputError, match=r"the server gave no metrics .*404"):
        main(words(tmp_path, server[0], server[0]))
    with pytest.raises(InputError, match=r"the server gave no metrics .*127.0.0.1:9\]"):
        main(words(tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:9"))
    with pytest.raises(InputError, match="cannot read the scrape"):
        main(words(tmp_path, str(tmp_path / "nowhere.txt"), "x"))
    assert not (tmp_path / "log").exists()


def test_an_unknown_engine_or_verb_ends_with_exit_code_2(tmp_path: Path) -> None:
    for wrong in (words(tmp_path, "a", "b", engine="abacus"), ["forget"], []):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


def test_a_log_is_shown_by_pair_domain_and_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = TrafficLog(tmp_path / "log")
    (interval,) = records(vllm(1), vllm(3))
    log.append(interval)
    (idle,) = records(sglang(1), sglang(2, length=0.0, rate=0.0), engine="sglang")
    log.append(idle)
    main(words(tmp_path, *[saved(tmp_path, f"{n}.txt", vllm(n), at=n) for n in (3, 4)]))
    main(words(tmp_path, *[saved(tmp_path, f"{n}.txt", vllm(n), at=n) for n in (4, 9)]))
    assert summary(read_traffic(tmp_path / "log")) == [
        # Scale 1 and 5 together; rate 170 / 240 and tau 280 / 110 are the same at any scale.
        ("tiny/v1", "unknown", "unknown", "vllm", "60", "1680", "0.708", "2.55"),
        ("tiny/v1", "chat", "0.5", "sglang", "10", "1010", "-", "1.00"),
        ("tiny/v1", "chat", "0.5", "vllm", "20", "560", "0.708", "2.55"),
    ]
    capsys.readouterr()
    assert main(["show", "--log", str(tmp_path / "log")]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "0.708" in shown.err and "torn" in shown.err
    with pytest.raises(InputError, match="no traffic log here"):
        main(["show", "--log", str(tmp_path / "nowhere")])
