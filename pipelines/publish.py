"""Stage 5: put the chosen pair into the registry, after a fresh process has decoded with nothing but its files."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference.errors import InputError
from inference.lookahead.fixed import Config as FixedConfig
from inference.pair_files import PAIR_FILE, SCHEMA_VERSION, TREE_KEY, TREE_WHEN_SAMPLED_KEY, read_pair
from inference.statistics import BASELINE, Scorecard
from pipelines import provenance
from pipelines.artifacts import MANIFEST, Artifact
from pipelines.build import DRAFT_FOLDER, HISTORY_FILE
from pipelines.captured import FIXED
from pipelines.context import RunContext
from pipelines.corpus import read_prompts
from pipelines.drift.fingerprints import fingerprints
from pipelines.errors import StageFailed
from pipelines.exports.write import SERVE_FOLDER, read_exports
from pipelines.files import fsync_path, fsync_tree, plain, read_json, sha256_file, write_json, write_text, writing
from pipelines.lineage import publish as track_pair
from pipelines.lineage import tracked
from pipelines.model_card import model_card
from pipelines.pairs.digests import seal
from pipelines.registry import CHAMPION, move_alias, next_version, versions
from pipelines.score_files import (
    CHAINS_FILE,
    PLOT_FILE,
    RECORDS_FILE,
    SCORECARD_FILE,
    TABLE_FILE,
    read_records,
    read_scorecards,
)
from pipelines.select import Decision, read_decision
from pipelines.took import FRESH, PUBLISH, STAGES_FILE, stages_of
from pipelines.verify import CHECKS_FILE, Check
from pipelines.version_report.contents import TRAINING_FIGURES, TRAINING_FILE
from pipelines.version_report.page import write_report
from train.memory import watched

logger = logging.getLogger(__name__)

CARD_FILE = "MODEL_CARD.md"
GOLDEN_FILE = "golden.json"
"""Scored greedy prompts with what the pair made of them: replayed when acceptance falls, to tell why."""


class PublishError(StageFailed):
    """The pair did not decode from its own files as it did while it was scored; nothing was published."""


@dataclass(frozen=True)
class Lineage:
    """The artifacts a pair comes from."""

    corpus: Artifact
    draft: Artifact
    score: Artifact
    select: Artifact
    training: dict[str, Any] = field(default_factory=dict)
    """What the draft's training took, where that is not the draft artifact's own to say."""
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the training of every candidate took, of those that this run trained."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What every stage before this one took."""


def run_publish(
    context: RunContext,
    corpus: Artifact,
    drafts: dict[str, Artifact],
    score: Artifact,
    select: Artifact,
    *,
    training: dict[str, Any] | None = None,
) -> Path:
    """Publish the decision's pair and make it champion, or find it published already; returns the version folder.

    The caller holds the registry lock.

    Raises:
        InputError: the registry cannot be written.
        PublishError: the fresh process decoded other tokens.
    """
    cfg = context.cfg
    decision = read_decision(select)
    trained = {name: _trained(draft) for name, draft in drafts.items() if "seconds" in draft.metrics}
    stages = stages_of(plan=context.plan_artifact, corpus=corpus, drafts=drafts, score=score, select=select)
    lineage = Lineage(corpus, drafts[decision.winner], score, select, training or {}, trained, stages)
    root = cfg.paths.registry
    found = _published(root, cfg.publish.name, select.digest)
    version = found or _publish(context, decision, lineage)
    if found:
        logger.info("publish: unchanged, skipped (%s)", version)
    move_alias(root, cfg.publish.name, CHAMPION, version.name, reason=decision.reason)
    if not found:
        _track(context, decision, lineage, version)
    return version


def _track(context: RunContext, decision: Decision, lineage: Lineage, version: Path) -> None:
    """Tell the run's tracker what the new version comes from."""
    speedups = {candidate.arm: candidate.speedup.value for candidate in decision.candidates}
    track_pair(
        context,
        version,
        digest=sha256_file(version / PAIR_FILE),
        uses=[tracked(context, lineage.corpus), tracked(context, lineage.draft, decision.winner)],
        metadata={"version": version.name, "draft": decision.winner, "reason": decision.reason, "speedups": speedups},
    )


def _published(root: Path, name: str, select_digest: str) -> Path | None:
    """The newest version that was published from the same decision; versions that cannot be read are passed over."""
    for version in reversed(versions(root, name)):
        try:
            lineage = read_pair(version).get("lineage", {})
        except InputError as error:
            logger.warning("passed over: %s", error)
            continue
        if lineage.get("select") == select_digest:
            return version
    return None


def _publish(context: RunContext, decision: Decision, lineage: Lineage) -> Path:
    """Write the version aside, let a fresh process decode with it, then give it its name."""
    root, name = context.cfg.paths.registry, context.cfg.publish.name
    version = next_version(root, name)
    folder = root / name / version
    aside = root / name / f".partial-{version}"
    with writing(aside), watched() as watch:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _copy_files(lineage, aside)
        cards = read_scorecards(lineage.score.path)
        write_json(aside / CHECKS_FILE, [asdict(check) for check in _checks(context, decision, lineage)])
        write_json(aside / GOLDEN_FILE, _golden(decision, lineage))
        write_json(aside / TRAINING_FILE, lineage.trained)
        write_json(aside / PAIR_FILE, _pair_info(context, decision, lineage, cards, version, aside))
        fresh = _finish_in_fresh_process(aside, context)
        # What is left, card and report, shows these figures and so is not in them.
        write_json(aside / STAGES_FILE, {**lineage.stages, PUBLISH: asdict(watch.took()), FRESH: fresh})
        location, exports = str(folder), read_exports(aside / SERVE_FOLDER)
        write_text(aside / CARD_FILE, model_card(read_pair(aside), decision, cards, location=location, exports=exports))
        write_report(aside, registry=root)
        seal(aside)
        fsync_tree(aside)
        os.rename(aside, folder)
        fsync_path(folder.parent)
    logger.info("published %s: %s", folder, decision.reason)
    return folder


def _copy_files(lineage: Lineage, aside: Path) -> None:
    """The draft, and what scoring and training left of their figures."""
    shutil.copytree(lineage.draft.path / DRAFT_FOLDER, aside / "draft")
    scored = [lineage.score.path / file for file in (SCORECARD_FILE, TABLE_FILE, PLOT_FILE, RECORDS_FILE)]
    scored += sorted(lineage.score.path.glob("calibration-*.json"))
    extra = [lineage.score.path / CHAINS_FILE, lineage.draft.path / HISTORY_FILE]
    for file in [*scored, *(file for file in extra if file.is_file())]:
        shutil.copyfile(file, aside / file.name)


def _finish_in_fresh_process(folder: Path, context: RunContext) -> dict[str, Any]:
    """Write the exports, load the files as a stranger would and decode; the tokens must be those of the score.

    Returns:
        What that process took.
    """
    cfg = context.cfg
    options = ["--cache", str(cfg.paths.cache), "--device", cfg.target.device]
    options += [word for name in cfg.publish.exports for word in ("--export", name)]
    # Without the folder dspark was called in (-P), where a `train` or an `inference` of the user's may lie.
    command = [sys.executable, "-P", "-m", "pipelines.finish", str(folder), *options]
    path = os.pathsep.join(filter(None, [str(provenance.ROOT), os.environ.get("PYTHONPATH", "")]))
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise PublishError(f"the pair did not reload from its files [{folder}]: {lines[-1]}")
    took: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["took"]
    return {**took, "seconds": time.monotonic() - start}  # its own clock starts when its libraries are loaded


def _checks(context: RunContext, decision: Decision, lineage: Lineage) -> list[Check]:
    """Scored requests to repeat: the winner's first ones, one per domain before a second of any.

    Under a policy that learns, block lengths depend on earlier requests, and with them the draws of a sampled answer;
    then only greedy ones can repeat. Captured rounds follow no policy.
    """
    cfg = context.cfg
    captured = _captured_rounds(read_json(lineage.score.path / SCORECARD_FILE), decision.winner)
    learns = cfg.lookahead.learns and captured is None
    records = [
        r
        for r in read_records(lineage.score.path / RECORDS_FILE)
        if r.arm == decision.winner and not (r.temperature and learns)
    ]
    chosen = list(dict.fromkeys(r.prompt_id for r in records))[: cfg.publish.check_prompts]
    prompts = {row.prompt.id: row.prompt for row in read_prompts(lineage.corpus.path)}
    return [
        Check(
            prompt_id=r.prompt_id,
            system=prompts[r.prompt_id].system,
            user=prompts[r.prompt_id].turns[0],
            temperature=r.temperature,
            arm=r.arm,
            seed=cfg.seed,
            max_new_tokens=cfg.decode.max_new_tokens,
            top_k=cfg.decode.top_k,
            top_p=cfg.decode.top_p,
            repetition_penalty=cfg.decode.repetition_penalty,
            digest=r.digest,
            passes=r.passes,
            captured_positions=0 if captured is None else captured["positions"],
        )
        for r in records
        if r.prompt_id in chosen
    ]


def _golden(decision: Decision, lineage: Lineage) -> list[dict[str, Any]]:
    """The winner's greedy requests: prompt, domain, tokens emitted and target passes."""
    prompts = {row.prompt.id: row.prompt for row in read_prompts(lineage.corpus.path)}
    return [
        {
            "prompt_id": r.prompt_id,
            "domain": r.domain,
            "system": prompts[r.prompt_id].system,
            "user": prompts[r.prompt_id].turns[0],
            "emitted": r.emitted,
            "passes": r.passes,
        }
        for r in read_records(lineage.score.path / RECORDS_FILE)
        if r.arm == decision.winner and r.temperature == 0.0
    ]


def _trained(draft: Artifact) -> dict[str, Any]:
    """Steps, tokens, seconds and speed, where this draft was trained here."""
    return {key: draft.metrics[key] for key in TRAINING_FIGURES if key in draft.metrics}


def _training(context: RunContext, draft: Artifact, name: str) -> dict[str, Any]:
    """What the draft's training took, as far as that is known: steps, tokens, seconds.

    A draft that was made elsewhere brings it in the manifest beside its folder, or in the pair it comes from.
    """
    found = _trained(draft)
    made = getattr(context.cfg.draft[name], "path", "") if not found else ""
    for folder in (Path(made), Path(made).parent) if made else ():
        if (folder / MANIFEST).is_file():
            metrics = read_json(folder / MANIFEST).get("metrics", {})
            found = {key: metrics[key] for key in TRAINING_FIGURES if key in metrics}
        elif (folder / PAIR_FILE).is_file():
            found = read_pair(folder).get("training", {})
    return found


def _captured_rounds(scorecard: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Tokens, positions and tree of the captured rounds an arm was measured by; None for the ordinary decoder, and of
    scores that are older than this."""
    found: dict[str, Any] | None = scorecard.get("captured_rounds", {}).get(name)
    return found


def _lookahead(context: RunContext, scorecard: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of the policy an arm was measured with: the configured one, but of captured rounds a fixed block, and
    their tree where they had one."""
    own, captured = context.cfg.lookahead, _captured_rounds(scorecard, name)
    block = scorecard["blocks"].get(name, {"tokens": 0, "siblings": []})
    if captured is None:
        return {**plain(asdict(own)), **block}
    tokens = captured["tokens"]
    if tokens and own.kind != FIXED:
        logger.info(
            "publish: %s was measured by captured rounds, so the pair names a fixed block of %d tokens and not "
            "lookahead=%s; chances and costs for that are kept with it (docs/gpu.md)",
            name,
            tokens,
            own.kind,
        )
    fixed = FixedConfig(
        longest_auto=own.longest_auto,
        siblings_auto=own.siblings_auto,
        trees=own.trees,
        tree_depths=own.tree_depths,
        tree_lookup=own.tree_lookup,
    )
    settings = {**plain(asdict(fixed)), "tokens": tokens}
    if captured.get("tree") is not None:
        settings[TREE_KEY] = captured["tree"]
    if captured.get("tree_when_sampled"):
        settings[TREE_WHEN_SAMPLED_KEY] = True
    return settings


def _pair_info(
    context: RunContext, decision: Decision, lineage: Lineage, cards: list[Scorecard], version: str, folder: Path
) -> dict[str, Any]:
    """What `pair.json` says."""
    cfg, plan = context.cfg, context.plan
    data = read_json(lineage.score.path / SCORECARD_FILE)
    winner, draft = decision.winner, folder / "draft"
    target_path = cfg.target.path if not Path(cfg.target.path).is_dir() else str(Path(cfg.target.path).resolve())
    return {
        "schema_version": SCHEMA_VERSION,
        "name": cfg.publish.name,
        "version": version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": {
            "path": target_path,
            "revision": cfg.target.revision,
            "digest": context.target_digest,
            "attention": cfg.target.attention,
            "fingerprints": fingerprints(context.target_folder),
        },
        "draft": {
            "name": winner,
            "kind": cfg.draft[winner].kind,
            "files": {p.relative_to(draft).as_posix(): sha256_file(p) for p in sorted(draft.rglob("*")) if p.is_file()},
        },
        "decoding": {
            "precision": plan.baseline_precision if winner == BASELINE else plan.block_precision,
            "lookahead": _lookahead(context, data, winner),
            "measured": data["measured"].get(winner),
        },
        "decision": asdict(decision),
        "training": lineage.training or _training(context, lineage.draft, winner),
        "scorecard": [card.to_dict() for card in cards if card.arm == winner],
        "cost_profile": {
            "device": plan.device,
            "versions": plan.profile.versions,
            "passes": plan.profile.passes,
            "spread": plan.profile.spread,
        },
        "lineage": {
            "corpus": lineage.corpus.digest,
            "draft": lineage.draft.digest,
            "score": lineage.score.digest,
            "select": lineage.select.digest,
            "plan": context.plan_artifact.digest,
            **provenance.collect(),
        },
    }


def summary(decision: Decision) -> list[list[str]]:
    """Rows of the last table a run prints."""
    return [
        [
            c.arm,
            str(c.speedup),
            f"{c.tau:.2f}",
            f"{c.draft_bytes / 2**20:.0f}",
            "winner" if c.arm == decision.winner else c.refused or "slower",
        ]
        for c in decision.candidates
    ]
