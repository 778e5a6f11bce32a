"""What a report says in words and tables: the verdict, the candidates, costs, the history, the lineage.

Words only: the page's template decides how they look, and escapes them.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from inference.pair_files import TREE_KEY, tree_size
from inference.statistics import BASELINE, OVERALL, find_card
from inference.target import EMBEDDED
from pipelines.advice import prompts_of
from pipelines.exports.write import SERVE_FOLDER, Export, Served
from pipelines.report import interval
from pipelines.took import stage_rows
from pipelines.version_report.chart import MIB, pooled, shown
from pipelines.version_report.contents import SPEED_FIGURES, Contents, plain_text

_ARTIFACTS = ("corpus", "draft", "score", "select", "plan")


@dataclass(frozen=True)
class Table:
    """Header and rows, in words.

    Attributes:
        header: of the columns.
        rows: a list of cells each.
        marked: index of the row to stress, or None.
    """

    header: list[str]
    rows: list[list[str]]
    marked: int | None = None


def verdict(contents: Contents) -> str:
    """Who won, by how much, against what, on what machine; in one sentence."""
    target = target_name(contents)
    prompts = prompts_of(contents.cards, arm=BASELINE)
    on = f"measured on {machine(contents)} with {prompts} held-out {'prompt' if prompts == 1 else 'prompts'}"
    if contents.winner == BASELINE:
        return f"Target-only decoding of {target} wins: {contents.decision.reason}; {on}."
    card = find_card(contents.cards, contents.winner)
    return (
        f"The {contents.winner} draft decodes {shown(card.speedup)} times as fast as target-only decoding of {target}, "
        f"which ran in the same engine in its own best arithmetic, {on}."
    )


def target_name(contents: Contents) -> str:
    """The target as its users call it: the last part of its path."""
    path = str(contents.info["target"]["path"])
    return "the embedded target" if path == EMBEDDED else PurePath(path).name


def machine(contents: Contents) -> str:
    """The device that was scored on."""
    return str(contents.info.get("cost_profile", {}).get("device", "an unknown device"))


def key_figures(contents: Contents) -> list[tuple[str, str, str]]:
    """The winner's few figures a reader looks for: name, value, explanation."""
    card = find_card(contents.cards, contents.winner)
    base = find_card(contents.cards, BASELINE)
    figures = [
        ("speedup", f"{card.speedup.value:.2f}x", f"95 %: {_ends(card.speedup.low, card.speedup.high)}"),
        ("tau", f"{card.tau.value:.2f}", "tokens per target pass, bonus included"),
        ("tokens/s", f"{card.tokens_per_s.value:.1f}", f"target-only {base.tokens_per_s.value:.1f}"),
        ("draft memory", f"{card.draft_bytes / MIB:.0f} MiB", f"target {card.target_bytes / MIB:.0f} MiB"),
    ]
    if card.cost_per_million is not None and base.cost_per_million is not None:
        cost = (f"{card.cost_per_million:.2f}", f"target-only {base.cost_per_million:.2f}")
        figures.append(("cost of 1M tokens", *cost))
    return figures


def _ends(low: float | None, high: float | None) -> str:
    return "no interval" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def candidates(contents: Contents) -> Table:
    """Every arm, fastest first, with the reason it did not win."""
    header = ["draft", "speedup", "tau", "alpha", "tokens/s", "draft MiB", "training", "outcome"]
    rows = []
    for candidate, card in zip(contents.decision.candidates, pooled(contents), strict=True):
        training = contents.training.get(card.arm, {})
        rows.append(
            [
                card.arm,
                str(card.speedup),
                str(card.tau),
                interval(card.alpha),
                f"{card.tokens_per_s.value:.1f}",
                f"{card.draft_bytes / MIB:.0f}",
                f"{float(training['seconds']):.0f} s" if "seconds" in training else "-",
                _outcome(contents, candidate.arm, candidate.refused),
            ]
        )
    return Table(header, rows, _place([candidate.arm for candidate in contents.decision.candidates], contents.winner))


def _outcome(contents: Contents, arm: str, refused: str) -> str:
    if arm == contents.winner:
        return "winner"
    if refused:
        return refused
    if arm in contents.decision.tied:
        return "cannot be told apart from the winner in speed; it needs more memory or is slower on average"
    return "slower than the winner beyond doubt"


def domains(contents: Contents) -> Table:
    """The winner by domain and temperature."""
    own = [c for c in contents.cards if c.arm == contents.winner]
    header = ["domain", "temperature", "prompts", "speedup", "tau", "alpha", "tokens/s"]
    rows = [
        [
            card.domain,
            f"{card.temperature:g}",
            str(card.requests),
            str(card.speedup),
            str(card.tau),
            interval(card.alpha),
            f"{card.tokens_per_s.value:.1f}",
        ]
        for card in sorted(own, key=lambda c: (c.domain == OVERALL, c.domain))
        if card.temperature is not None
    ]
    return Table(header, rows)


def calibration(contents: Contents) -> Table:
    """Calibration errors and areas under the curve, by draft and position."""
    header = ["draft", "position", "rounds", "error", "error, calibrated", "AUC", "AUC of margins"]
    rows = [
        [
            arm,
            str(at.position),
            str(at.proposed),
            shown(at.error_before, 3),
            shown(at.error_after, 3),
            shown(at.auc),
            shown(at.margin_auc),
        ]
        for arm, positions in contents.calibrations.items()
        for at in positions
    ]
    return Table(header, rows)


def chances(contents: Contents) -> str:
    """What the pair's policy goes by; empty where it goes by no chances."""
    known = (contents.info["decoding"].get("measured") or {}).get("chances")
    if known is None:
        return ""
    if known["source"] == "margin":
        return "The policy goes by the margins between the draft's two largest logits."
    calibrated = "calibrated" if known["calibration"] else "as the draft states them"
    return f"The policy goes by the draft's own confidences, {calibrated}."


def costs(contents: Contents) -> Table | None:
    """Price of a million tokens of every arm, and the saving; None without a price."""
    base = find_card(contents.cards, BASELINE).cost_per_million
    if base is None:
        return None
    rows = [
        [
            card.arm,
            f"{card.cost_per_million:.2f}",
            "-" if card.arm == BASELINE else f"{1 - card.cost_per_million / base:+.0%}",
        ]
        for card in pooled(contents)
        if card.cost_per_million is not None
    ]
    arms = [row[0] for row in rows]
    return Table(["draft", "a million tokens", "saved"], rows, _place(arms, contents.winner))


def _place(names: list[str], wanted: str) -> int | None:
    """Where a name stands; a decision need not list its candidates."""
    return names.index(wanted) if wanted in names else None


def exports(contents: Contents) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Formats of the draft; of each engine that loads it its name, the command that starts it, and why it refuses."""
    return [
        (
            export.layout,
            [(one.engine, _command(contents, export, one), one.refuses) for one in export.engines],
        )
        for export in contents.exports
    ]


def _command(contents: Contents, export: Export, one: Served) -> str:
    """With the places that it names; a program in Python as it is."""
    if one.refuses or one.engine == "transformers":
        return one.command
    places = [f"TARGET={shlex.quote(str(contents.info['target']['path']))}"]
    if export.folder:
        places.append(f"DRAFT={shlex.quote(f'{contents.location}/{SERVE_FOLDER}/{export.folder}')}")
    return "\n".join([*places, one.command])


def history(contents: Contents) -> Table | None:
    """Moves of aliases and ends of re-alignments, oldest first; None without any."""
    moves = [
        (
            str(event["time"]),
            f"{event['alias']} -> {event['to']}",
            f"from {event['from']}" if event["from"] else "first",
            str(event["reason"] or ""),
        )
        for event in contents.events
    ]
    ends = [
        (
            one.ended,
            f"re-alignment {one.outcome.replace('_', ' ')}",
            f"from {one.champion}{f' to {one.version}' if one.version else ''}",
            "; ".join([one.reason, *(f"because {why}" for why in one.figures.get("why", []))]),
        )
        for one in contents.cycles
    ]
    rows = [list(row) for row in sorted([*moves, *ends])]
    return Table(["time", "what", "versions", "reason"], rows) if rows else None


def training(contents: Contents) -> Table | None:
    """How fast every draft was trained, of those that tell; None where none does."""
    known = {name: of for name, of in contents.training.items() if "steps_per_s" in of}
    rows = [
        [
            name,
            f"{of['steps']:,}" if "steps" in of else "-",
            f"{of['seconds']:.0f}" if "seconds" in of else "-",
            f"{of['steps_per_s']:.3g}",
            f"{of['tokens_per_s']:,.0f}" if "tokens_per_s" in of else "-",
            f"{of['fed_tokens_per_s']:,.0f}" if "fed_tokens_per_s" in of else "-",
            f"{of['step_tflops'] * of['steps_per_s']:.3g}" if "step_tflops" in of else "-",
            _mfu(of),
        ]
        for name, of in known.items()
    ]
    header = ["draft", "steps", "seconds", "steps/s", "supervised tokens/s", "fed tokens/s", "TFLOP/s", "MFU"]
    return Table(header, rows, _place(list(known), contents.winner)) if rows else None


def _mfu(of: Mapping[str, Any]) -> str:
    """The share of the device's peak, and the peak where it is told."""
    share = f"{of['mfu']:.1%}" if "mfu" in of else "-"
    return f"{share} of {of['peak_tflops']:g}" if "mfu" in of and "peak_tflops" in of else share


def stages(contents: Contents) -> Table:
    """What each stage of the run took, in its order."""
    return Table(*stage_rows(contents.stages))


def lineage(contents: Contents) -> Table:
    """What the version was made from."""
    info = contents.info
    known: Mapping[str, Any] = info.get("lineage", {})
    code: Mapping[str, Any] = known.get("code", {})
    rows = [
        ["pair", f"{info.get('name', '')} {info.get('version', '')}"],
        ["created", str(info.get("created", ""))],
        ["target", str(info["target"]["path"])],
        ["target revision", str(info["target"]["revision"])],
        ["target digest", str(info["target"]["digest"])],
        *(
            [f"{kind} digest", str(known[kind])]
            for kind in ("corpus", "draft", "score", "select", "plan")
            if kind in known
        ),
        ["arithmetic", str(info["decoding"]["precision"])],
        ["lookahead", plain_text(_without_paths(info["decoding"]["lookahead"]))],
        *(
            [f"training {key}", plain_text(value)]
            for key, value in info.get("training", {}).items()
            if key not in SPEED_FIGURES
        ),
        ["code", f"{code.get('commit')}{', with uncommitted changes' if code.get('dirty') else ''}"],
        ["command", shlex.join(known.get("argv", []))],
        ["machine", _pairs(known.get("machine", {}))],
        ["packages", _pairs(known.get("packages", {}))],
    ]
    return Table(["what", "value"], [row for row in rows if row[1]])


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a policy, of its tree the number of tokens alone."""
    return {**settings, TREE_KEY: tree_size(settings)} if settings.get(TREE_KEY) else dict(settings)


def _pairs(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in data.items())


def commands(location: str) -> list[tuple[str, str]]:
    """How to decode with the pair: what for, and the command."""
    where = shlex.quote(location)
    return [
        ("decode once", f'dspark generate --pair {where} "Why is the sky blue?"'),
        ("answer OpenAI-compatible requests", f"dspark serve --pair {where}"),
        ("repeat its scored requests", f"python -m pipelines.verify {where}"),
    ]
