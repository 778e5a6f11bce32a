"""Everything a report shows, read from the files of a version folder alone and, when given, from its registry.

Figures are computed anew from `records.jsonl`; this module computes none of its own. What a version does not have (a
calibration, a curve, examples, exports) is empty here and left out of the report.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.batch.load import Point
from inference.batch.load_figures import LoadFigure
from inference.errors import InputError
from inference.pair_files import PAIR_FILE, read_pair
from inference.reliability import Bin, PositionReport
from inference.statistics import Estimate, Scorecard, scorecards
from pipelines.build import HISTORY_FILE
from pipelines.exports.write import SERVE_FOLDER, Export, read_exports
from pipelines.files import read_json
from pipelines.load import LOAD_FILE
from pipelines.realign.cycle import Ended, history
from pipelines.registry import read_events
from pipelines.score_files import RECORDS_FILE, SCORECARD_FILE, read_records
from pipelines.select import Candidate, Decision
from pipelines.took import read_stages
from pipelines.version_report.examples import EXAMPLES_FILE, Example, read_examples

TRAINING_FILE = "training.json"
"""What training took, by draft: `{"seed": {"steps": 100, "tokens": 1000, "seconds": 9.5}}`."""
SPEED_FIGURES = ("steps_per_s", "tokens_per_s", "fed_tokens_per_s", "step_tflops", "peak_tflops", "mfu")
"""What else it says of drafts that were trained here: see `train.throughput.Speed`."""
TRAINING_FIGURES = ("steps", "tokens", "seconds", *SPEED_FIGURES)
"""All that it may say of a draft."""


@dataclass(frozen=True)
class Contents:
    """What a version folder and its registry tell.

    Attributes:
        info: what `pair.json` says.
        decision: who won, and why the others did not.
        cards: of every arm, domain and temperature.
        price_per_hour: behind the costs; 0 for unknown.
        stages: what each stage of the run took, by name; empty where the version is older than that.
        training: what it took, by draft, where that is known: `TRAINING_FIGURES`.
        calibrations: by draft, a report for each position; empty where nothing was calibrated.
        curve: rows of the training's history, each with its `step`.
        load: figures of many requests at once.
        examples: prompts with their answers, token by token.
        exports: of the draft for serving engines.
        events: moves of this pair's aliases, oldest first.
        cycles: re-alignments of this pair that ended, oldest first.
        location: folder to name in commands.
    """

    info: dict[str, Any]
    decision: Decision
    cards: list[Scorecard]
    price_per_hour: float
    stages: dict[str, dict[str, Any]]
    training: dict[str, dict[str, Any]]
    calibrations: dict[str, list[PositionReport]]
    curve: list[dict[str, Any]]
    load: list[LoadFigure]
    examples: list[Example]
    exports: list[Export]
    events: list[dict[str, str | None]]
    cycles: list[Ended]
    location: str

    @property
    def winner(self) -> str:
        """Name of the chosen draft."""
        return self.decision.winner

    @property
    def arms(self) -> list[str]:
        """Every arm, the baseline first."""
        return list(dict.fromkeys(card.arm for card in self.cards))

    @property
    def temperatures(self) -> list[float]:
        """Scored, ascending."""
        return sorted({card.temperature for card in self.cards if card.temperature is not None})


def read_contents(
    folder: Path, *, registry: Path | None = None, price_per_hour: float | None = None, load: Path | None = None
) -> Contents:
    """Read a version.

    Args:
        folder: of the version, under any name.
        registry: root it belongs to, for the events and the re-alignments; None leaves them out.
        price_per_hour: of the machine; None takes the one it was scored with.
        load: folder of a load of this pair; None takes `load.json` from the version, where it has one.

    Raises:
        InputError: the folder holds no whole version.
    """
    info = read_pair(folder)
    name, version = str(info.get("name", "")), str(info.get("version", ""))
    data = read_json(folder / SCORECARD_FILE)
    price = float(data["price_per_hour"]) if price_per_hour is None else price_per_hour
    decision = _decision(info, where=str(folder / PAIR_FILE))
    return Contents(
        info=info,
        decision=decision,
        cards=_cards(folder, price, int(data["seed"])),
        price_per_hour=price,
        stages=read_stages(folder),
        training=_training(folder, info, decision.winner),
        calibrations=_calibrations(folder, decision),
        curve=_optional(folder / HISTORY_FILE, []),
        load=read_load(load / LOAD_FILE if load else folder / LOAD_FILE, needed=load is not None),
        examples=read_examples(folder / EXAMPLES_FILE),
        exports=read_exports(folder / SERVE_FOLDER),
        events=[] if registry is None else [e for e in read_events(registry) if e["pair"] == name],
        cycles=[] if registry is None else history(registry / name),
        location=str(folder if registry is None else registry / name / version),
    )


def _decision(info: Mapping[str, Any], *, where: str) -> Decision:
    """The decision in `pair.json`."""
    try:
        data = info["decision"]
        candidates = [Candidate(**{**c, "speedup": Estimate(**c["speedup"])}) for c in data["candidates"]]
        return Decision(**{**data, "candidates": candidates})
    except (KeyError, TypeError) as error:
        raise InputError(f"no decision in the pair: {error}", where=where, mend="publish the pair again") from None


def _cards(folder: Path, price_per_hour: float, seed: int) -> list[Scorecard]:
    records = read_records(folder / RECORDS_FILE)
    if not records:
        raise InputError("no records of a score", where=str(folder / RECORDS_FILE), mend="publish the pair again")
    return scorecards(records, price_per_hour=price_per_hour, seed=seed)


def _training(folder: Path, info: Mapping[str, Any], winner: str) -> dict[str, dict[str, Any]]:
    """By draft; of the winner what `pair.json` says, which knows more of a draft that was made elsewhere."""
    found: dict[str, dict[str, Any]] = dict(_optional(folder / TRAINING_FILE, {}))
    if info.get("training"):
        found[winner] = info["training"]
    return found


def _calibrations(folder: Path, decision: Decision) -> dict[str, list[PositionReport]]:
    """Of the arms that have one beside the scorecard, in the order of the decision."""
    files = {c.arm: folder / f"calibration-{c.arm}.json" for c in decision.candidates}
    return {
        arm: [_position(row) for row in read_json(file)["positions"]] for arm, file in files.items() if file.is_file()
    }


def _position(row: Mapping[str, Any]) -> PositionReport:
    """One position of a calibration, null turned back into not a number."""

    def estimate(data: Mapping[str, Any]) -> Estimate:
        return Estimate(math.nan if data["value"] is None else data["value"], data["low"], data["high"])

    figures = {key: estimate(row[key]) for key in ("error_before", "error_after", "auc", "margin_auc")}
    before, after = (tuple(Bin(*bin_) for bin_ in row[side]) for side in ("before", "after"))
    return PositionReport(
        position=row["position"],
        proposed=row["proposed"],
        observations=row["observations"],
        **figures,
        before=before,
        after=after,
    )


def read_load(path: Path, *, needed: bool) -> list[LoadFigure]:
    """Figures of a load.

    Args:
        path: its `load.json`.
        needed: whether it has to be there.

    Raises:
        InputError: it is needed and not there, or cannot be read.
    """
    data = read_json(path) if needed else _optional(path, {"figures": []})
    return [_load_figure(row) for row in data["figures"]]


def _load_figure(row: Mapping[str, Any]) -> LoadFigure:
    estimates = {
        key: None if row[key] is None else Estimate(**row[key]) for key in ("tokens_per_s", "over_none", "over_fixed")
    }
    pairs = {
        key: None if row[key] is None else tuple(row[key])
        for key in ("token_ms", "request_token_ms", "first_ms", "total_ms")
    }
    return LoadFigure(**{**row, **estimates, **pairs, "point": Point(**row["point"])})


def _optional(path: Path, otherwise: Any) -> Any:
    """A JSON file, or what stands for one that is not there."""
    return read_json(path) if path.is_file() else otherwise


def plain_text(value: Any) -> str:
    """A value from a file as one short line: words as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
