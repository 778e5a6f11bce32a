"""What the monitor says of a published pair: a table, a picture, and why."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from inference.pair_files import read_pair
from inference.traffic import Traffic, pair_label, read_traffic
from pipelines.drift.config import DriftConfig
from pipelines.drift.fingerprints import fingerprints
from pipelines.drift.mix import LEARN
from pipelines.drift.monitor import Alarm, State, alarms, interval, load, observe, references, save
from pipelines.files import replacing, write_json, write_text
from pipelines.report import markdown_table
from pipelines.score_files import CHAINS_FILE, RECORDS_FILE, read_records

logger = logging.getLogger(__name__)

STATE_FILE, REPORT_FILE, TABLE_FILE, PLOT_FILE = "monitor.json", "drift.json", "drift.md", "drift.png"
_HEADER = ["stratum", "requests", "published", "now (95 %)", "evidence", "alarm"]


@dataclass(frozen=True)
class DriftReport:
    """The monitor's findings.

    Attributes:
        pair: name and version.
        target: digest of the present target.
        alarms: what has changed; empty when nothing has.
        rows: a line per stratum, as in the table.
        mix_evidence: that the mix of domains has moved.
        mix_moved: whether that is beyond its threshold; no reason to train anything by itself.
        psi: stability index of the mix.
        others: requests of other versions or targets, which count for nothing here.
        unscored: requests of strata that the score did not have, which cannot be judged.
        torn: lines of the log that could not be read.
    """

    pair: str
    target: str
    alarms: list[Alarm]
    rows: list[list[str]]
    mix_evidence: float
    mix_moved: bool
    psi: float
    others: dict[str, int]
    unscored: dict[str, int]
    torn: int


def run_drift(
    pair_folder: Path, target_folder: Path, target_digest: str, log: Path, out: Path, cfg: DriftConfig
) -> DriftReport:
    """Look at the log, go on from the monitor's state, and write state, table and picture.

    Args:
        pair_folder: version folder of the champion.
        target_folder: of the target there is now.
        target_digest: of it.
        log: folder of the traffic log.
        out: folder of the monitor.
        cfg: what counts as drift.

    Raises:
        InputError: the pair cannot be read, or there is no log and nothing else to tell of.
    """
    info = read_pair(pair_folder)
    state = load(out / STATE_FILE, pair=pair_label(info), target=target_digest)
    # Known changes alarm without any log; only acceptance needs one.
    changed = _changed(info, target_folder, target_digest)
    traffic = read_traffic(log) if log.is_dir() or not changed else Traffic([], 0, 0, 0, 0, 0)
    scored = [record for file in (RECORDS_FILE, CHAINS_FILE) for record in read_records(pair_folder / file)]
    published = references(scored, info["draft"]["name"])
    observe(state, traffic.records, published, cfg)
    save(state, out / STATE_FILE)
    found = [*changed, *alarms(state)]
    report = DriftReport(
        pair=state.pair,
        target=target_digest,
        alarms=found,
        rows=_rows(state),
        mix_evidence=state.mix.evidence,
        mix_moved=state.mix.evidence >= cfg.mix_threshold,
        psi=state.mix.psi(),
        others=dict(state.others),
        unscored=dict(state.unscored),
        torn=traffic.torn,
    )
    _write(report, state, out, cfg)
    return report


def _changed(info: dict[str, Any], folder: Path, digest: str) -> list[Alarm]:
    """What is known to have changed, without any statistics."""
    reference = info["target"]
    found = []
    if digest != reference["digest"]:
        why = f"the target has changed: digest {digest[:12]}, published for {reference['digest'][:12]}"
        found.append(Alarm("target", "weights or settings", float("inf"), why))
    published = reference.get("fingerprints", {})
    for kind, now in fingerprints(folder).items():
        if kind in published and published[kind] != now:
            why = f"the target's {kind.replace('_', ' ')} has changed"
            found.append(Alarm(kind, kind, float("inf"), why))
    return found


def _rows(state: State) -> list[list[str]]:
    rows = []
    for name, stratum in sorted(state.strata.items()):
        low, high = interval(stratum)
        evidence = stratum.detector.statistic
        alarm = f"after {stratum.alarm_at}" if stratum.alarm_at else "-"
        now = f"{np.mean(stratum.rates):.3f} [{low:.3f}, {high:.3f}]"
        rows.append([name, str(stratum.detector.count), f"{stratum.reference:.3f}", now, f"{evidence:.3g}", alarm])
    return rows


def _write(report: DriftReport, state: State, out: Path, cfg: DriftConfig) -> None:
    mix = f"mix of domains: {'has moved' if report.mix_moved else 'as before'} (PSI {report.psi:.3f})"
    if state.mix.learnt.total() < LEARN:
        mix = f"mix of domains: still learning, {state.mix.learnt.total()} of {LEARN} requests"
    lines = [
        f"# Drift of {report.pair}",
        "",
        *([f"- ALARM: {alarm.why}" for alarm in report.alarms] or ["- no alarm"]),
        f"- {mix}",
        *[f"- not counted: {count} requests of {who}" for who, count in report.others.items()],
        *[f"- not judged: {count} requests of {who}: never scored" for who, count in report.unscored.items()],
        *([f"- {report.torn} lines of the log could not be read"] if report.torn else []),
        "",
        markdown_table(_HEADER, report.rows),
    ]
    write_text(out / TABLE_FILE, "\n".join(lines) + "\n")
    write_json(out / REPORT_FILE, json.loads(json.dumps(asdict(report), default=str).replace("Infinity", '"Infinity"')))
    _plot(state, out / PLOT_FILE, cfg)
    _show(report)
    for line in lines[2:-2]:
        logger.info("%s", line.removeprefix("- "))


def _show(report: DriftReport) -> None:
    """The table on stderr, like all progress."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEADER, title=f"acceptance of {report.pair} by request")
    for row in report.rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def _plot(state: State, path: Path, cfg: DriftConfig) -> None:
    """Running means against what was published, and the detectors' evidence against its threshold."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(11, 4), layout="constrained")
    means, evidence = figure.subplots(1, 2)
    for index, (name, stratum) in enumerate(sorted(state.strata.items())):
        rates = np.array(stratum.rates)
        at = np.arange(1, len(rates) + 1) + stratum.detector.count - len(rates)
        window = max(5, len(rates) // 10)
        smooth = np.convolve(rates, np.ones(min(window, len(rates))) / min(window, len(rates)), mode="valid")
        means.plot(at[-len(smooth) :], smooth, color=f"C{index}", label=name)
        means.axhline(stratum.reference, color=f"C{index}", linestyle=":")
        evidence.semilogy(at, np.maximum(np.array(stratum.history), 1e-3), color=f"C{index}", label=name)
    evidence.axhline(cfg.threshold, color="grey", linestyle="--", label="alarm")
    means.set(xlabel="requests", ylabel="acceptance rate, moving mean (dotted: published)", ylim=(0, 1))
    evidence.set(xlabel="requests", ylabel="evidence of a fall")
    if state.strata:
        means.legend(fontsize=8)
    evidence.legend(fontsize=8)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
