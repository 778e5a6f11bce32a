"""Why acceptance fell: the published draft on the prompts it was scored on, with the target there is now (has the
target moved?), and on recent traffic with the target it was made for (has the traffic moved?).

Greedy decoding with the pair's own policy, by rounds of its tree where it has one; what is compared is tau. Paired with
the score where the prompts are the same, against its interval where they are not.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.chat import messages_for, render_prompt
from distill.prompts.jsonl import Config as Jsonl
from inference.decoder import decode
from inference.drafters import LoadContext, load_drafter
from inference.errors import InputError
from inference.graphed.arms import captured_decoder
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.pair_files import PAIR_FILE, TREE_KEY
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt
from inference.statistics import OVERALL, Estimate
from inference.target import TargetConfig, stop_tokens, target_digest
from inference.trees import Tree
from pipelines.files import read_json
from pipelines.progress import tracked
from pipelines.publish import GOLDEN_FILE
from pipelines.realign.snapshot import HELDOUT_FILE

logger = logging.getLogger(__name__)

_RESAMPLES = 2000


@dataclass(frozen=True)
class Change:
    """Tau of the published draft then and now.

    Attributes:
        domain: of the prompts, or `overall`.
        prompts: how many.
        before: tau that was published; its interval where the prompts now are others.
        now: tau measured now, with its interval.
        change: now / before - 1, with its interval where the prompts are the same.
    """

    domain: str
    prompts: int
    before: Estimate
    now: Estimate
    change: Estimate


@dataclass(frozen=True)
class Cause:
    """What has moved.

    Attributes:
        target: the published prompts under the present target, by domain; empty when the target is the same.
        traffic: recent traffic under the target the draft was made for, by domain; empty when that is gone.
        words: the same in sentences.
    """

    target: list[Change] = field(default_factory=list)
    traffic: list[Change] = field(default_factory=list)
    words: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    domain: str
    emitted: int
    passes: int
    before: tuple[int, int] | None


def find_cause(
    champion: Path,
    info: dict[str, Any],
    *,
    target: TargetConfig,
    present_digest: str,
    cache: Path,
    precision: str,
    snapshot: Path,
    prompts: int,
    max_new_tokens: int,
) -> Cause:
    """Replay published prompts on the present target, and recent traffic on the published one.

    Args:
        champion: version folder.
        info: its `pair.json`.
        target: the present target.
        present_digest: of the present target.
        cache: of converted models.
        precision: arithmetic of both.
        snapshot: artifact folder of the cycle's prompts.
        prompts: most of each kind.
        max_new_tokens: longest answer; published answers were cut there too.

    Raises:
        InputError: the draft does not fit the present target, or its tree and a target that cannot be captured.
    """
    words: list[str] = []
    moved: list[Change] = []
    if present_digest != info["target"]["digest"]:
        model = target.load(cache, precision=precision)
        golden = _golden(champion, model)[:prompts]
        if golden:
            runs = _runs(
                champion,
                info,
                model,
                target.folder(cache),
                [p for p, _ in golden],
                [b for _, b in golden],
                max_new_tokens,
                "golden",
            )
            moved = _changes(runs, published={})
            words.append(_say("the target has moved", moved))
        del model
    else:
        words.append("the target is the one the draft was made for")
    shifted: list[Change] = []
    old = _published_target(info, target.device, cache)
    if old is None:
        words.append("the target the draft was made for is not there any more, so traffic was not replayed on it")
    else:
        model = old.load(cache, precision=precision)
        recent = _recent(snapshot, model)[:prompts]
        published = {c["domain"]: Estimate(**c["tau"]) for c in info["scorecard"] if c["temperature"] == 0.0}
        if recent and published:
            runs = _runs(
                champion, info, model, old.folder(cache), recent, [None] * len(recent), max_new_tokens, "traffic"
            )
            shifted = _changes(runs, published=published)
            words.append(_say("on its own target, traffic has moved", shifted))
    for sentence in words:
        logger.info("cause: %s", sentence)
    return Cause(moved, shifted, words)


def to_json(cause: Cause) -> dict[str, Any]:
    """Plain data."""
    return asdict(cause)


def _golden(champion: Path, target: CausalModel) -> list[tuple[ScorePrompt, tuple[int, int]]]:
    """The published prompts with (emitted, passes) of then; none where the version was published without them."""
    path = champion / GOLDEN_FILE
    if not path.is_file():
        return []
    return [
        (
            ScorePrompt(row["prompt_id"], row["domain"], _tokens(target, row["user"], row["system"])),
            (int(row["emitted"]), int(row["passes"])),
        )
        for row in read_json(path)
    ]


def _recent(snapshot: Path, target: CausalModel) -> list[ScorePrompt]:
    """Prompts of the cycle's traffic that only the gate sees, one domain after the other in turn."""
    found = Jsonl(path=str(snapshot / HELDOUT_FILE), heldout=True).prompts()
    groups: dict[str, list[ScorePrompt]] = {}
    for prompt in found:
        tokens = _tokens(target, prompt.turns[0], prompt.system)
        groups.setdefault(prompt.domain, []).append(ScorePrompt(prompt.id, prompt.domain, tokens))
    longest = max(map(len, groups.values()))
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def _tokens(target: CausalModel, user: str, system: str | None) -> torch.Tensor:
    ids = render_prompt(target.tokenizer, messages_for([user], system=system))
    return torch.tensor(ids, device=target.device)


def _published_target(info: dict[str, Any], device: str, cache: Path) -> TargetConfig | None:
    """The target the pair was made for, where it still is what it was."""
    reference = info["target"]
    config = TargetConfig(path=reference["path"], revision=reference["revision"], device=device)
    try:
        same = target_digest(config.folder(cache)) == reference["digest"]
    except (InputError, OSError):
        return None
    return config if same else None


def _runs(
    champion: Path,
    info: dict[str, Any],
    target: CausalModel,
    target_folder: Path,
    prompts: Sequence[ScorePrompt],
    before: Sequence[tuple[int, int] | None],
    max_new_tokens: int,
    name: str,
) -> list[_Run]:
    context = LoadContext(champion / "draft", target_folder, target, target.precision, target.device)
    settings = info["decoding"]["lookahead"]  # of whatever policy: its block, proposed every round
    drafter, lookahead = (
        load_drafter(context),
        FixedLookahead(settings["tokens"], siblings=settings.get("siblings", ())),
    )
    request = Request(
        settings=SamplingSettings(temperature=0.0), max_new_tokens=max_new_tokens, stop_tokens=stop_tokens(target)
    )
    data, rounds = settings.get(TREE_KEY), None
    if data is not None:
        longest = max(int(prompt.tokens.shape[0]) for prompt in prompts) + max_new_tokens
        tree = Tree.from_json(data, where=PAIR_FILE)
        rounds = captured_decoder(target, drafter, block=lookahead.longest, tokens=longest, tree=tree)
    found = []
    for prompt, then in zip(tracked(prompts, name, unit="prompts"), before, strict=True):
        if prompt.tokens.shape[0] >= target.context_limit:
            continue
        if rounds is not None:
            done = rounds.decode(prompt.tokens, request=request, seed=0)
        else:
            source = TorchSource.seeded(0, device=target.device)
            done = decode(target, drafter, prompt.tokens, request=request, lookahead=lookahead, generator=source)
        if done.passes:
            found.append(_Run(prompt.domain, len(done.tokens), done.passes, then))
    return found


def _changes(runs: list[_Run], *, published: dict[str, Estimate]) -> list[Change]:
    """By domain and overall; paired by prompt where the runs know what they gave before."""
    domains = [*sorted({run.domain for run in runs}), OVERALL]
    found = []
    for domain in domains:
        mine = [run for run in runs if domain in (OVERALL, run.domain)]
        paired = all(run.before is not None for run in mine)
        if not paired and domain not in published:
            continue
        counts = np.array([(r.emitted, r.passes, *(r.before or (0, 0))) for r in mine], dtype=np.float64)
        draws = np.random.default_rng(0).integers(len(mine), size=(_RESAMPLES, len(mine)))
        sums = np.concatenate([counts.sum(0)[None], counts[draws].sum(1)])
        tau = sums[:, 0] / sums[:, 1]
        if paired:
            then = sums[:, 2] / sums[:, 3]
            before, change = _estimate(then), _estimate(tau / then - 1)
        else:
            before = published[domain]
            change = _estimate(tau / before.value - 1)
        found.append(Change(domain, len(mine), before, _estimate(tau), change))
    return found


def _estimate(values: "np.ndarray[Any, np.dtype[np.float64]]") -> Estimate:
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))


def _say(what: str, changes: list[Change]) -> str:
    parts = [f"{c.domain} {c.before.value:.2f} -> {c.now.value:.2f} ({c.change.value:+.0%})" for c in changes]
    surely = [c.domain for c in changes if c.change.surely_below(0.0)]
    told = f"; surely lower: {', '.join(surely)}" if surely else "; nowhere surely lower"
    return f"{what}? tau {', '.join(parts)}{told}"
