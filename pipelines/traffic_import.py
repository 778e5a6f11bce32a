"""`dspark traffic`: bring the counters of a serving engine into a traffic log, and show what a log holds.

    dspark traffic import --engine vllm --from before.txt --from after.txt --log traffic --pair smollm2/v3 ...
    dspark traffic show --log traffic

How counters become records is said in `pipelines.traffic_counters`.
"""

import argparse
import logging
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from inference.errors import InputError
from inference.traffic import Traffic, TrafficConfig, TrafficLog, TrafficRecord, read_traffic
from pipelines.traffic_counters import ENGINES, UNKNOWN_TEMPERATURE, records_of
from pipelines.traffic_scrapes import Scrape, read_scrape

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Run `dspark traffic import` or `dspark traffic show`.

    Raises:
        InputError: a scrape or the log cannot be used; the command line prints it.
    """
    parser = argparse.ArgumentParser(prog="dspark traffic", description="Logs of served requests.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="what a log holds")
    show.add_argument("--log", required=True, type=Path, help="folder of the log")
    bring = verbs.add_parser("import", help="bring in metrics of vLLM or SGLang")
    bring.add_argument("--engine", required=True, choices=sorted(ENGINES), help="that serves")
    bring.add_argument(
        "--from", required=True, action="append", dest="sources", help="a saved scrape or http address, oldest first"
    )
    bring.add_argument("--every", type=float, default=60.0, help="seconds to wait between addresses (default: 60)")
    bring.add_argument("--model", default=None, help="model_name, where the server has several")
    bring.add_argument("--log", required=True, type=Path, help="folder of the log")
    bring.add_argument("--pair", required=True, help="that is served, as in smollm2-135m/v3")
    bring.add_argument("--target-digest", required=True, help="digest of the pair's target")
    bring.add_argument("--arm", default="", help="that serves (default: the engine's name)")
    bring.add_argument("--domain", default="", help="of the requests (default: unknown)")
    bring.add_argument(
        "--temperature", type=float, default=UNKNOWN_TEMPERATURE, help="of the requests (default: -1, unknown)"
    )
    words = parser.parse_args(argv)
    if words.verb == "show":
        _show(words.log.expanduser())
    else:
        _import(words)
    return 0


def _import(words: argparse.Namespace) -> None:
    if not (math.isfinite(words.every) and words.every >= 0):
        raise InputError(f"cannot wait {words.every} seconds", where="--every", mend="give 0 or more")
    scrapes: list[Scrape] = []
    for source in words.sources:
        if scrapes and source.startswith("http"):
            time.sleep(words.every)
        scrapes.append(read_scrape(source, model=words.model))
    records = records_of(
        scrapes,
        engine=words.engine,
        pair=words.pair,
        target=words.target_digest,
        arm=words.arm,
        domain=words.domain,
        temperature=words.temperature,
    )
    folder = words.log.expanduser()
    log = TrafficLog(folder, config=TrafficConfig())
    known = {record.id for record in read_traffic(folder).records}
    fresh = [record for record in records if record.id not in known]
    for record in fresh:
        log.append(record)
    if log.lost:
        raise InputError(f"{log.lost} records could not be written", where=str(folder), mend="free some space")
    logger.info("%d intervals imported, %d were there already", len(fresh), len(records) - len(fresh))


def summary(traffic: Traffic) -> list[tuple[str, ...]]:
    """Rows of the table: by pair, domain, temperature and source, with what is summed over their records."""
    groups: dict[tuple[str, str, float, str], list[TrafficRecord]] = defaultdict(list)
    for record in traffic.records:
        groups[record.pair, record.domain, record.temperature, record.source].append(record)
    rows: list[tuple[str, ...]] = []
    for (pair, domain, temperature, source), records in sorted(groups.items()):
        whole = _summed(records)
        rows.append(
            (
                pair,
                domain or "unknown",
                "unknown" if temperature < 0 else f"{temperature:g}",
                source,
                str(whole.requests),
                str(whole.emitted),
                "-" if whole.rate is None else f"{whole.rate:.3f}",
                "-" if whole.tau is None else f"{whole.tau:.2f}",
            )
        )
    return rows


def _summed(records: list[TrafficRecord]) -> TrafficRecord:
    """One record that stands for many; positions are summed into one."""
    return replace(
        records[0],
        requests=sum(record.requests for record in records),
        emitted=sum(record.emitted for record in records),
        passes=sum(record.passes for record in records),
        proposed=[sum(sum(record.proposed) for record in records)],
        accepted=[sum(sum(record.accepted) for record in records)],
    )


def _show(folder: Path) -> None:
    """The table, on stderr like all progress."""
    from rich.console import Console
    from rich.table import Table

    traffic = read_traffic(folder)
    title = (
        f"{folder}: {len(traffic.records)} records in {traffic.segments} segments, {traffic.nbytes / 1e6:.1f} MB; "
        f"{traffic.torn} torn lines, {traffic.newer} of a newer version, {traffic.dropped} records dropped"
    )
    names = ("pair", "domain", "temperature", "source", "requests", "tokens", "acceptance", "tau")
    table = Table(*names, title=title)
    for row in summary(traffic):
        table.add_row(*row)
    Console(stderr=True).print(table)
