"""The page says who won first, lacks what the version lacks, runs nothing, fetches nothing and escapes everything."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from inference.errors import InputError
from inference.pair import load_pair
from pipelines.registry import move_alias
from pipelines.verify import read_checks
from pipelines.version_report.contents import TRAINING_FIGURES, read_contents
from pipelines.version_report.examples import EXAMPLES_FILE, write_examples
from pipelines.version_report.page import REPORT_FILE, render, rounds, write_report
from pipelines.version_report.tables import training
from tests.pipelines.conftest import Finished
from tests.pipelines.test_decisions import Made
from tests.pipelines.version_report.versions import (
    NAME,
    add_everything,
    ended,
    example,
    write,
    write_version,
)

SEEDS = Path(__file__).resolve().parents[3] / "distill" / "seeds"
EVIL = '<script>alert("x")</script>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class _Reader(HTMLParser):
    """Collects tags, ids and text, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> _Reader:
    """Parse a page."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def headings(page: str) -> list[str]:
    return re.findall(r"<h2 id=\"(.*?)\">", page)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a version with everything."""
    root = tmp_path_factory.mktemp("registry")
    folder = write_version(root, price=0.36)
    add_everything(folder, root)
    return render(read_contents(folder, registry=root))


def test_the_first_thing_it_says_is_who_won_by_how_much_against_what_and_where(full: str) -> None:
    [first] = re.findall(r"<h1>(.*?)</h1>", full, flags=re.DOTALL)
    assert re.fullmatch(
        r"The fast draft decodes 1\.\d\d \[1\.\d\d, 1\.\d\d\] times as fast as target-only decoding of some-target, "
        r"which ran in the same engine in its own best arithmetic, measured on Some CPU with 12 held-out prompts\.",
        first,
    )


def test_sections_come_in_the_order_a_reader_wants_and_are_linked(full: str) -> None:
    expected = "advice candidates speed acceptance domains seconds load cost examples reliability learning stages"
    assert headings(full) == [*expected.split(), "history", "use", "lineage"]
    assert re.findall(r'<li><a href="#(.*?)">', full) == headings(full)


def test_the_page_is_whole_and_its_ids_are_its_own(full: str) -> None:
    reader = read(full)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert len(full) < 1_500_000


def test_nothing_runs_and_nothing_is_fetched(full: str) -> None:
    reader = read(full)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    outward = [
        (n, v) for n, v in reader.attributes if n in ("href", "src", "xlink:href") and not str(v).startswith("#")
    ]
    assert not outward and not [n for n, _ in reader.attributes if n.startswith("on")]
    assert "url(" not in re.sub(r"url\(#", "", full) and "@import" not in full
    assert "default-src 'none'" in full


def test_every_figure_says_in_words_what_it_shows_and_gives_its_numbers(full: str) -> None:
    figures = re.findall(r"<figure .*?</figure>", full, flags=re.DOTALL)
    assert len(figures) == 15
    for figure in figures:
        [label] = re.findall(r'role="img" aria-label="(.*?)"', figure)
        assert len(html.unescape(label)) > 20 and "<details>" in figure and "<table>" in figure


def test_candidates_say_why_they_lost(full: str) -> None:
    assert "does not beat 1" in full and "is the baseline" in full and "winner" in full


def test_examples_tell_kinds_apart_by_more_than_colour(full: str) -> None:
    assert '<span class="accepted">It</span><span class="target"> is</span>' in full
    assert ".rejected{" in full and "line-through" in full and "dotted" in full


def test_stages_show_seconds_and_memory_and_what_is_to_be_known_of_them(full: str) -> None:
    start = full.index('<h2 id="stages">')
    section = full[start : full.index("</section>", start)]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", section)]
    assert rows == [
        ["stage", "seconds", "peak memory, MiB", "peak on the GPU, MiB", "note"],
        ["corpus", "12.3", "300", "-", ""],
        ["build: fast", "12.3", "300", "50", "after its last resume"],
        ["publish", "12.3", "300", "-", "most memory since the process began"],
    ]


def test_exports_history_and_costs_are_there(full: str) -> None:
    text = html.unescape(full)
    assert "TARGET=org/some-target\nDRAFT=" in text and "vllm serve $TARGET" in text
    assert "sglang: not this draft, it has no such draft." in text
    assert "champion -> v1" in text and "re-alignment kept" in text and "because acceptance on chat fell" in text
    assert "+40%" in text or "+39%" in text or "+41%" in text, "6 ms a token against 10"
    assert "dspark 'a b'" in text, "the command line that made it"


def test_a_bare_version_leaves_out_what_it_lacks(tmp_path: Path) -> None:
    page = render(read_contents(write_version(tmp_path)))
    missing = {"load", "examples", "reliability", "learning", "stages", "history"}
    assert not missing & set(headings(page)) and len(headings(page)) == 9
    assert "No price per hour was given" in page and "--price-per-hour" in page
    read(page)


def test_target_only_decoding_can_win(tmp_path: Path) -> None:
    page = render(read_contents(write_version(tmp_path, {"slow": Made(1.5, 20.0)})))
    assert "Target-only decoding of some-target wins: no draft may win" in page and "Do not speculate" in page
    alone = render(read_contents(write_version(tmp_path / "alone", {})))
    assert "Only target-only decoding was scored." in alone and "Nothing was proposed." in alone
    read(page)
    read(alone)


def test_one_prompt_has_no_intervals(tmp_path: Path) -> None:
    page = render(read_contents(write_version(tmp_path, {"fast": Made(2.0, 12.0)}, prompts=1)))
    assert "1 held-out prompt." in page and "no interval" in page


def test_whatever_comes_from_elsewhere_is_escaped(tmp_path: Path) -> None:
    folder = write_version(
        tmp_path,
        {EVIL: Made(2.0, 12.0)},
        training={"steps": EVIL},
        cost_profile={"device": EVIL},
        target={"path": f"a/{EVIL}", "revision": EVIL, "digest": EVIL, "attention": "sdpa"},
        lineage={"argv": [EVIL], "machine": {EVIL: 1}},
    )
    write(folder / "examples.json", [example(EVIL, [(EVIL, "accepted", 1), (EVIL, "rejected", 1)])])
    served = [{"engine": EVIL, "command": EVIL, "refuses": ""}, {"engine": "b", "command": "", "refuses": EVIL}]
    export = {"layout": EVIL, "folder": EVIL, "tokens": 2, "engines": served, "files": {}}
    write(folder / "serve" / "exports.json", {"schema_version": 1, "exports": [export]})
    move_alias(tmp_path, NAME, "champion", "v1", reason=EVIL)
    page = render(read_contents(folder, registry=tmp_path))
    reader = read(page)
    assert "script" not in reader.tags and "<script" not in page
    assert reader.text.count('alert("x")') > 12, "shown as text instead"


def test_rounds_say_what_became_of_their_proposals(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    tokens = [("a", "accepted", 1), ("x", "rejected", 1), ("b", "target", 1), ("c", "target", 2)]
    write(folder / "examples.json", [example("p", tokens)])
    [one] = read_contents(folder).examples
    assert [label for label, _ in rounds(one)] == [
        "pass 1: 1 of 2 proposed tokens stand",
        "pass 2: 0 of 0 proposed tokens stand",
    ]
    page = render(read_contents(folder))
    assert '<del class="rejected">x</del><span class="target">b</span></span><span class="pass"' in page


def test_the_report_is_written_into_the_version_under_any_name(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    aside = folder.rename(folder.with_name(".partial-v1"))
    write_report(aside, registry=tmp_path)
    page = (aside / REPORT_FILE).read_text(encoding="utf-8")
    assert "partial" not in page and f"{tmp_path}/pair/v1" in page, "commands name the place it will have"
    assert not [p for p in aside.iterdir() if p.name.endswith(".aside")]


def test_history_of_other_pairs_is_left_out(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    (tmp_path / "other" / "v9").mkdir(parents=True)
    move_alias(tmp_path, "other", "champion", "v9", reason="another pair")
    assert read_contents(folder, registry=tmp_path).events == []
    assert ended("kept", 1.0, ended="2026-01-01T00:00:00+00:00").figures["speed_ratio"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [("decision", "no decision in the pair"), ("records", "no records of a score"), ("scorecard", "cannot read")],
)
def test_a_version_that_is_not_whole_is_refused_in_one_line(tmp_path: Path, change: str, words: str) -> None:
    folder = write_version(tmp_path, **({"decision": {}} if change == "decision" else {}))
    if change != "decision":
        (folder / {"records": "records.jsonl", "scorecard": "scorecard.json"}[change]).unlink()
    with pytest.raises(InputError, match=words):
        read_contents(folder)


def test_a_version_made_by_a_run_can_be_shown_with_its_examples(finished: Finished, tmp_path: Path) -> None:
    place = finished.place
    folder = Path(shutil.copytree(place.champion.resolve(), tmp_path / "v1"))
    pair = load_pair(folder, device="cpu", cache=place.cache)
    write_examples(pair, read_checks(folder), folder / EXAMPLES_FILE)
    write_report(folder, registry=place.registry)
    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    reader = read(page)
    assert "examples" in headings(page) and "history" in headings(page)
    for example_ in read_contents(folder).examples:
        assert example_.prompt in reader.text


def test_training_speeds_are_told_of_drafts_that_know_them(tmp_path: Path) -> None:
    folder = write_version(tmp_path)
    fast = {"steps": 8000, "seconds": 382.0, "steps_per_s": 21.0, "tokens_per_s": 12_345.6, "fed_tokens_per_s": 5e4}
    on_gpu = {**fast, "step_tflops": 10.0, "peak_tflops": 989.0, "mfu": 210 / 989}
    write(folder / "training.json", {"fast": on_gpu, "slow": fast, "old": {"steps": 1, "seconds": 2.0}})
    known = training(read_contents(folder))
    assert known is not None and [row[0] for row in known.rows] == ["fast", "slow"]
    assert known.rows[0][1:] == ["8,000", "382", "21", "12,346", "50,000", "210", "21.2% of 989"]
    assert known.rows[1][-2:] == ["-", "-"]
    assert "learning" in headings(render(read_contents(folder)))


@pytest.mark.parametrize("manifest", sorted(SEEDS.glob("*/manifest.json")), ids=lambda file: file.parent.name)
def test_what_a_seed_tells_of_its_training_is_shown(manifest: Path, tmp_path: Path) -> None:
    metrics = json.loads(manifest.read_text(encoding="utf-8"))["metrics"]
    folder = write_version(tmp_path)
    write(folder / "training.json", {"seed": {name: metrics[name] for name in TRAINING_FIGURES if name in metrics}})
    known = training(read_contents(folder))
    assert known is not None and known.rows[0][0] == "seed"
    assert known.rows[0][-1].startswith(f"{metrics['mfu']:.1%}")
