"""Stage 3: acceptance and speed of every candidate, measured in our own decoder on held-out prompts.

All arms run in one process, interleaved prompt by prompt in shuffled order, after a warm-up that is not counted.
Records are appended prompt by prompt, so a killed score goes on after its last prompt. Every figure is computed from
them.
"""

import json
import logging
from pathlib import Path
from typing import Any, TextIO

import torch

from distill.chat import messages_for, render_prompt
from inference.draft_parts import draft_parts
from inference.drafters import LoadContext, load_drafter
from inference.errors import InputError
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.records import Record
from inference.scoring import Arm, ScorePrompt, score_prompt
from inference.statistics import BASELINE, OVERALL, Scorecard, find_card, scorecards
from inference.target import stop_tokens
from pipelines.artifacts import Artifact, Spec, Work
from pipelines.build import DRAFT_FOLDER
from pipelines.captured import by_chains, captured_arms, captured_markdown, captures
from pipelines.config import RunConfig
from pipelines.context import RunContext
from pipelines.corpus import SplitPrompt, read_prompts
from pipelines.errors import StageFailed
from pipelines.files import write_text
from pipelines.prescore import PRESCORE_FILE, Ranking, prescore_markdown, rank_arms
from pipelines.progress import tracked
from pipelines.report import scorecard_markdown, scorecard_plot
from pipelines.score_files import CHAINS_FILE, PLOT_FILE, RECORDS_FILE, SCORECARD_FILE, TABLE_FILE, read_records
from pipelines.score_plan import ScorePlan, make_score_plan, with_lookahead

logger = logging.getLogger(__name__)

SCORE_PLAN_FILE = "score_plan.json"
_WARM_UP_TOKENS = 8
_SCREEN_RESAMPLES = 500
_ABOVE_TAU = 1.05
"""Speedup over tau whose lower bound shows a handicapped baseline. Not 1: where a draft proposes next to nothing, both
arms do the same work, and a few prompts differ by some per cent for no other reason than the machine."""


def score_spec(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact]) -> Spec:
    """What a score is made from; the device is part of it, since speed is."""
    cfg, plan = context.cfg, context.plan
    return Spec(
        "score",
        config={
            "score": cfg.score,
            "decode": cfg.decode,
            "lookahead": cfg.lookahead,
            "arms": list(drafts),
            "budget": {"score_minutes": cfg.budget.score_minutes, "score_prompts": cfg.budget.score_prompts},
            "device": plan.device,
            "captured": captures(cfg),
            "precision": {"baseline": plan.baseline_precision, "block": plan.block_precision},
        },
        inputs={
            "target": context.target_digest,
            "corpus": corpus.digest,
            **{f"draft/{name}": draft.digest for name, draft in drafts.items()},
        },
        seed=cfg.seed,
    )


def check_baseline(cfg: RunConfig) -> None:
    """Refuse a list of drafts without the baseline, before anything is made for it.

    Raises:
        InputError: no draft `none` of the kind `none`.
    """
    if BASELINE not in cfg.draft or cfg.draft[BASELINE].kind != BASELINE:
        raise InputError(
            "a score needs the baseline", where="draft", mend="add none to the list, as in draft=[none,lookup]"
        )


def run_score(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact]) -> Artifact:
    """Score all drafts, or find the score.

    Raises:
        InputError: no baseline among the drafts, no held-out prompt, or a draft that does not fit the target.
        ScoreError: the measurements contradict themselves.
    """
    check_baseline(context.cfg)
    return context.store.obtain(
        score_spec(context, corpus, drafts), make=lambda work: _make(context, corpus, drafts, work)
    )


class ScoreError(StageFailed):
    """The measurements cannot be right: a speedup above tau, or greedy output that rounding does not explain."""


def _make(context: RunContext, corpus: Artifact, drafts: dict[str, Artifact], work: Work) -> None:
    cfg = context.cfg
    arms = load_arms(context, drafts)
    prompts = score_prompts(read_prompts(corpus.path), arms[BASELINE].target, cfg.score.max_prompt_tokens)
    stops = stop_tokens(arms[BASELINE].target)
    ranking = rank_arms(context, arms, prompts["validation"], stops, work.folder / PRESCORE_FILE)
    arms = arms if ranking is None else ranking.kept(arms)
    spent = 0.0 if ranking is None else ranking.seconds
    plan = make_score_plan(context, arms, prompts, stops, work.folder / SCORE_PLAN_FILE, spent_seconds=spent)
    measured = plan.measured(context)
    arms = {n: with_lookahead(context, arm, plan.blocks.get(n), measured.get(n)) for n, arm in arms.items()}
    warm_up(context, arms, prompts["validation"][0], stops)
    by_id = {prompt.id: prompt for prompt in prompts["heldout"]}
    chosen = [by_id[i] for i in plan.prompts]
    _measure(context, arms, chosen, plan, stops, work.folder / RECORDS_FILE)
    _measure_chains(context, arms, chosen, stops, work.folder / CHAINS_FILE)
    records = read_records(work.folder / RECORDS_FILE)
    cards = scorecards(records, price_per_hour=cfg.score.price_per_hour, seed=cfg.seed)
    check_scorecards(cards)
    write_results(work, cards, plan, context, arms, ranking=ranking)


def load_arms(context: RunContext, drafts: dict[str, Artifact]) -> dict[str, Arm]:
    """One arm per draft; the baseline in its own best arithmetic, all others sharing one target. Those that are decoded
    by captured rounds have a decoder of their longest block."""
    cfg, plan = context.cfg, context.plan
    targets: dict[str, CausalModel] = {}

    def target(precision: str) -> CausalModel:
        if precision not in targets:
            targets[precision] = cfg.target.load(cfg.paths.cache, precision=precision)
        return targets[precision]

    arms = {}
    for name, artifact in drafts.items():
        verifier = target(plan.baseline_precision if name == BASELINE else plan.block_precision)
        drafter = load_drafter(
            LoadContext(
                folder=artifact.path / DRAFT_FOLDER,
                target_folder=context.target_folder,
                target=verifier,
                precision=plan.block_precision,
                device=verifier.device,
            )
        )
        arms[name] = Arm(name, verifier, drafter, FixedLookahead(0))
    return captured_arms(context, arms)


def score_prompts(rows: list[SplitPrompt], target: CausalModel, max_tokens: int) -> dict[str, list[ScorePrompt]]:
    """First turns of validation and held-out prompts in tokens, by split; those too long left out.

    Raises:
        InputError: none of a split is short enough.
    """
    limit = min(max_tokens, target.context_limit - 1)
    found: dict[str, list[ScorePrompt]] = {"validation": [], "heldout": []}
    for row in rows:
        if row.split in found:
            ids = render_prompt(target.tokenizer, messages_for(row.prompt.turns, system=row.prompt.system))
            if len(ids) <= limit:
                tokens = torch.tensor(ids, device=target.device)
                found[row.split].append(ScorePrompt(row.prompt.id, row.prompt.domain, tokens))
    for split, prompts in found.items():
        if not prompts:
            raise InputError(
                f"no {split} prompt within {limit} tokens", where="score", mend="add prompts or raise the limit"
            )
    return found


def warm_up(context: RunContext, arms: dict[str, Arm], prompt: ScorePrompt, stops: frozenset[int]) -> None:
    """Run every arm once, so that nothing is measured cold."""
    for temperature in context.cfg.score.temperatures:
        score_prompt(
            list(arms.values()),
            prompt,
            settings=context.cfg.decode.settings(temperature),
            max_new_tokens=_WARM_UP_TOKENS,
            stop_tokens=stops,
            seed=context.cfg.seed,
        )


def _measure(
    context: RunContext,
    arms: dict[str, Arm],
    prompts: list[ScorePrompt],
    plan: ScorePlan,
    stops: frozenset[int],
    path: Path,
) -> None:
    """Decode what has no records yet, appending all arms of a prompt and temperature at once."""
    cfg = context.cfg
    order = [prompt.id for prompt in prompts]
    records = whole_records(read_records(path), order, plan, arms=list(arms), below=cfg.score.screen_below)
    write_text(path, "".join(record.to_json() + "\n" for record in records))  # drops what was torn
    done = {(record.prompt_id, record.temperature) for record in records}
    running = list(arms)
    with path.open("a", encoding="utf-8") as stream:
        for number, prompt in enumerate(tracked(prompts, "score", unit="prompts")):
            if plan.screen_at and number == plan.screen_at:
                slow = slow_arms(records, set(order[: plan.screen_at]), cfg.score.screen_below)
                for arm, speedup in slow.items():
                    logger.info("%s: speedup %.2f so far, measured no further", arm, speedup)
                running = [arm for arm in arms if arm not in slow]
            records += decode_missing(context, [arms[name] for name in running], prompt, done, stops, stream)


def _measure_chains(
    context: RunContext, arms: dict[str, Arm], prompts: list[ScorePrompt], stops: frozenset[int], path: Path
) -> None:
    """Decode by chains what was decoded by trees, for who watches requests by chains; no speed is taken from it."""
    cfg = context.cfg
    chains: dict[float, list[Arm]] = {}
    for temperature in cfg.score.temperatures:
        made = [by_chains(context, arm, temperature=temperature) for arm in arms.values()]
        chains[temperature] = [arm for arm in made if arm is not None]
    if not any(chains.values()):
        return
    known = read_records(path)
    write_text(path, "".join(record.to_json() + "\n" for record in known))  # drops what was torn
    done = {(record.arm, record.prompt_id, record.temperature) for record in known}
    with path.open("a", encoding="utf-8") as stream:
        for prompt in tracked(prompts, "chains", unit="prompts"):
            for temperature, own in chains.items():
                missing = [arm for arm in own if (arm.name, prompt.id, temperature) not in done]
                if not missing:
                    continue
                new = score_prompt(
                    [arms[BASELINE], *missing],
                    prompt,
                    settings=cfg.decode.settings(temperature),
                    max_new_tokens=cfg.decode.max_new_tokens,
                    stop_tokens=stops,
                    seed=cfg.seed,
                )
                stream.write("".join(record.to_json() + "\n" for record in new if record.arm != BASELINE))
                stream.flush()


def decode_missing(
    context: RunContext,
    arms: list[Arm],
    prompt: ScorePrompt,
    done: set[tuple[str, float]],
    stops: frozenset[int],
    stream: TextIO,
) -> list[Record]:
    """Decode a prompt under all arms at the temperatures it lacks; returns the records, after appending them to a file.

    Args:
        context: of the run.
        arms: to decode under, the baseline among them.
        prompt: what is asked.
        done: ids and temperatures there are records of.
        stops: tokens that end an answer.
        stream: file of records; flushed after every temperature.
    """
    cfg = context.cfg
    found: list[Record] = []
    for temperature in cfg.score.temperatures:
        if (prompt.id, temperature) in done:
            continue
        new = score_prompt(
            arms,
            prompt,
            settings=cfg.decode.settings(temperature),
            max_new_tokens=cfg.decode.max_new_tokens,
            stop_tokens=stops,
            seed=cfg.seed,
        )
        stream.write("".join(record.to_json() + "\n" for record in new))
        stream.flush()
        found += new
    return found


def whole_records(
    records: list[Record], order: list[str], plan: ScorePlan, *, arms: list[str], below: float
) -> list[Record]:
    """Leave out the last request unless all its arms are there: a kill or a full disk may have cut it anywhere.

    Args:
        records: as read back.
        order: ids of the prompts in the order they are decoded.
        plan: of this score.
        arms: all of them, in the order their records are written.
        below: see `ScoreConfig.screen_below`.
    """
    if not records:
        return []
    last = (records[-1].prompt_id, records[-1].temperature)
    running = arms
    if plan.screen_at and order.index(last[0]) >= plan.screen_at:
        slow = slow_arms(records, set(order[: plan.screen_at]), below)
        running = [arm for arm in arms if arm not in slow]
    if records[-1].arm == running[-1]:
        return records
    return [record for record in records if (record.prompt_id, record.temperature) != last]


def slow_arms(records: list[Record], prompt_ids: set[str], below: float) -> dict[str, float]:
    """Arms whose speedup over the first prompts is under the bar, interval included, with that speedup."""
    cards = scorecards([r for r in records if r.prompt_id in prompt_ids], resamples=_SCREEN_RESAMPLES)
    drafts = sorted({r.arm for r in records} - {BASELINE})
    speedups = {arm: find_card(cards, arm).speedup for arm in drafts}
    return {arm: speedup.value for arm, speedup in speedups.items() if speedup.surely_below(below)}


def check_scorecards(cards: list[Scorecard]) -> None:
    """Refuse measurements that cannot be right.

    Speeds are compared with tau over all prompts and temperatures together: cards of a domain rest on a handful of
    requests, and among dozens of such intervals some lie above 1 by chance alone.

    Raises:
        ScoreError: a speedup above tau beyond doubt (the baseline was handicapped), or a greedy mismatch that is no
            near-tie (decoding was not lossless).
    """
    for card in cards:
        place = f"{card.arm}, {card.domain}, temperature {'all' if card.temperature is None else card.temperature}"
        pooled = card.domain == OVERALL and card.temperature is None and card.arm != BASELINE
        if pooled and card.speedup_over_tau.surely_above(1.0):
            message = f"speedup {card.speedup.value:.3f} is above tau {card.tau.value:.3f} [{place}]"
            if card.speedup_over_tau.surely_above(_ABOVE_TAU):
                raise ScoreError(f"{message}: the baseline is handicapped; score again on an idle machine")
            logger.warning("%s, by no more than noise", message)
        if card.unexplained:
            raise ScoreError(
                f"{card.unexplained} greedy outputs differ where the target has no near-tie [{place}]: "
                "decoding was not lossless"
            )


def write_results(
    work: Work,
    cards: list[Scorecard],
    plan: ScorePlan,
    context: RunContext,
    arms: dict[str, Arm],
    *,
    ranking: Ranking | None = None,
) -> None:
    """Scorecard as data, table and picture, with the ranking of all candidates where one was made; the summary goes
    into the manifest."""
    # What runs as one graph has no parts of a pass that could be timed by themselves.
    timed = {
        name: draft_parts(arms[name].drafter, tokens=choice.tokens)
        for name, choice in plan.blocks.items()
        if name not in plan.captured
    }
    parts = {name: found for name, found in timed.items() if found is not None}
    data: dict[str, Any] = {
        "seed": context.cfg.seed,
        "price_per_hour": context.cfg.score.price_per_hour,
        "blocks": {n: {"tokens": c.tokens, "siblings": c.siblings} for n, c in plan.blocks.items()},
        "policies": plan.policies,
        "captured": sorted(plan.captured),
        "captured_rounds": {
            name: {
                "tokens": arm.captured.rounds.block,
                "positions": arm.captured.rounds.capacity,
                "tree": None if arm.captured.tree is None else arm.captured.tree.to_json(),
                "tree_when_sampled": arm.captured.rounds.tree_when_sampled,
            }
            for name, arm in arms.items()
            if arm.captured is not None
        },
        "measured": {name: known.to_json() for name, known in plan.measured(context).items()},
        "draft_parts": parts,
        "prescore": None if ranking is None else ranking.to_json(),
        "scorecards": [card.to_dict() for card in cards],
    }
    write_text(work.folder / SCORECARD_FILE, json.dumps(data, indent=1) + "\n")
    sections = [scorecard_markdown(cards, plan.blocks, parts), captured_markdown(plan)]
    if ranking is not None:
        sections.append(prescore_markdown(ranking))
    write_text(work.folder / TABLE_FILE, "\n".join(section for section in sections if section))
    scorecard_plot(cards, work.folder / PLOT_FILE)
    work.metrics["speedup"] = {c.arm: c.speedup.value for c in cards if c.domain == "overall" and c.temperature is None}
    work.metrics["tau"] = {c.arm: c.tau.value for c in cards if c.domain == "overall" and c.temperature is None}
