"""What a cycle makes: the champion as it is, and a challenger of the same kind, trained on or from scratch.

The challenger's settings come from the champion's own files, so it stays what it was but for its weights.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.drafts.made import Config as Made
from distill.drafts.mixed import Config as Mixed
from distill.drafts.none import Config as NoDraft
from distill.drafts.pretrained import Config as Pretrained
from distill.prompts import SourceConfig
from distill.prompts.jsonl import Config as Jsonl
from inference.drafters.mixed import INNER_FOLDER
from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_networks._checkpoint import CONFIG_FILE, misfit
from inference.pair_files import read_draft_spec
from inference.plugins import plugin
from inference.statistics import BASELINE
from pipelines.config import RunConfig
from pipelines.realign.config import RealignConfig
from pipelines.realign.snapshot import HELDOUT_FILE, TRAIN_FILE, count_lines

CHAMPION, CHALLENGER = "champion", "challenger"
INNER_CHAMPION, INNER_CHALLENGER = "champion_inner", "challenger_inner"
_WRITES_PROMPTS = "magpie"


@dataclass(frozen=True)
class Candidates:
    """The drafts of a cycle.

    Attributes:
        drafts: by name, for the build stage; not all are scored.
        scored: the arms of the gate, the baseline among them.
        opponent: what the challenger has to beat: the champion, or target-only decoding where it does not fit.
        trained: name of the draft that is trained.
        fresh: whether it starts from new weights.
        why_fresh: the reason, empty for a warm start.
        step_share: tokens in a step of its training over those in a step of the champion's.
    """

    drafts: dict[str, Any]
    scored: list[str]
    opponent: str
    trained: str
    fresh: bool
    why_fresh: str
    step_share: float


def candidates(champion: Path, target_folder: Path, cfg: RealignConfig, *, failures: int) -> Candidates:
    """Drafts of a cycle for a champion's version folder.

    Args:
        champion: version folder in the registry.
        target_folder: of the target there is now.
        cfg: how the challenger is trained.
        failures: cycles in a row that ended without promotion.

    Raises:
        InputError: the champion is of a kind that is not trained, or its files cannot be read.
    """
    folder = champion / "draft"
    spec = read_draft_spec(folder)
    mixed = spec["kind"] == "mixed"
    inner = folder / INNER_FOLDER if mixed else folder
    unfit = misfit(inner, target_folder)
    why = (
        unfit
        or ("realign.fresh asks for it" if cfg.fresh else "")
        or (f"{failures} cycles in a row ended without promotion" if failures >= cfg.scratch_after else "")
    )
    start = INNER_CHAMPION if mixed else CHAMPION
    trained, step_share = _trained(inner, cfg, start="" if why else start)
    drafts: dict[str, Any] = {BASELINE: NoDraft()}
    if not unfit:
        drafts[CHAMPION] = Made(path=str(folder))
    if mixed:
        settings = {name: spec[name] for name in ("longest", "shortest", "draft_tokens")}
        if not unfit:
            drafts[INNER_CHAMPION] = Made(path=str(inner))
        drafts |= {INNER_CHALLENGER: trained, CHALLENGER: Mixed(of=INNER_CHALLENGER, **settings)}  # type: ignore[arg-type]
    else:
        drafts[CHALLENGER] = trained
    opponent = BASELINE if unfit else CHAMPION
    scored = list(dict.fromkeys([BASELINE, opponent, CHALLENGER]))
    name = INNER_CHALLENGER if mixed else CHALLENGER
    return Candidates(drafts, scored, opponent, name, bool(why), why, step_share)


def _trained(folder: Path, cfg: RealignConfig, *, start: str) -> tuple[Any, float]:
    """Settings of the challenger's training, and its step over the champion's.

    Args:
        folder: of the champion's trained draft.
        cfg: how the challenger is trained.
        start: name of the draft it goes on from, empty for new weights.
    """
    kind = read_draft_spec(folder)["kind"]
    if kind == "feature":
        settings = _feature(folder)
        rate = settings.lr * (cfg.lr_scale if start else 1.0)
        sequences = cfg.sequences_per_step or settings.sequences_per_step
        share = sequences / settings.sequences_per_step
        new = {"start_from": start, "lr": rate, "training_weight": 1.0, "sequences_per_step": sequences}
        return dataclasses.replace(settings, **new), share  # type: ignore[arg-type]
    if kind == "model" and start:
        student = Pretrained(path=str(folder))
        return dataclasses.replace(
            student, sequences_per_step=cfg.sequences_per_step or student.sequences_per_step
        ), 1.0
    mend = "run dspark for a new pair" if kind == "model" else "what is not trained needs no re-alignment"
    what = "a draft model cannot start anew here" if kind == "model" else f"the champion is of kind {kind}"
    raise InputError(what, where=str(folder), mend=mend)


def _feature(folder: Path) -> FeatureDraftConfig:
    """Settings a draft that reads features was trained with."""
    path = folder / CONFIG_FILE
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        known = plugin("inference.feature_drafts", str(text["kind"])).Config
        settings: FeatureDraftConfig = known(**text["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"unreadable draft: {error}", where=str(path), mend="publish the pair again") from None
    return settings


def sources(cfg: RunConfig, snapshot: Path) -> dict[str, SourceConfig]:
    """Prompts of a cycle: traffic, and a replay share of the run's own training sources.

    Prompts that the target would have to write first are left out of the replay.
    """
    traffic = min(count_lines(snapshot / TRAIN_FILE), _traffic_prompts(cfg.realign))
    replay = {
        name: source for name, source in cfg.prompts.items() if not source.heldout and source.kind != _WRITES_PROMPTS
    }
    share = cfg.realign.replay_share
    each = math.ceil(traffic * share / (1 - share) / len(replay)) if replay and share else 0
    chosen: dict[str, SourceConfig] = {
        "traffic": Jsonl(path=str(snapshot / TRAIN_FILE), limit=traffic),
        "traffic_heldout": Jsonl(path=str(snapshot / HELDOUT_FILE), heldout=True),
    }
    if each:
        chosen |= {name: dataclasses.replace(source, limit=each) for name, source in replay.items()}
    return chosen


def _traffic_prompts(cfg: RealignConfig) -> int:
    return max(4, round(cfg.responses * (1 - cfg.replay_share)))


def responses(cfg: RunConfig, snapshot: Path) -> int:
    """Responses of a cycle: what its sources can give, up to the configured number."""
    traffic = min(count_lines(snapshot / TRAIN_FILE), _traffic_prompts(cfg.realign))
    return min(cfg.realign.responses, max(8, round(traffic / (1 - cfg.realign.replay_share))))
