"""Figures of a draft: acceptance by position and domain, reliability, learning curves, and its re-alignments."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeGuard

from inference.reliability import Bin
from inference.statistics import BASELINE, OVERALL, Estimate, Scorecard, find_card
from pipelines.learning_fit import AHEAD, fit_curve, measured, proposed
from pipelines.version_report.chart import DIAGONAL, FOREST, LINES, Chart, Series, exact, looks, named, pooled, shown
from pipelines.version_report.contents import Contents


def _conditional(cards: Iterable[tuple[str, Scorecard]]) -> tuple[Series, ...]:
    """Acceptance by position, one series a card; positions that were never verified are left out."""
    return tuple(
        named(name, [(k + 1, e) for k, e in enumerate(card.conditional) if not math.isnan(e.value)])
        for name, card in cards
        if card.conditional
    )


def _positions(key: str, title: str, sentence: str, series: tuple[Series, ...]) -> list[Chart]:
    if not series:
        return []
    return [
        Chart(
            key=key,
            title=title,
            sentence=sentence,
            kind=LINES,
            x_label="position in the block",
            y_label="conditional acceptance",
            series=series,
            whole_x=True,
        )
    ]


def positions_by_draft(contents: Contents) -> list[Chart]:
    """Conditional acceptance of every draft, all temperatures together."""
    look = looks(contents)
    series = _conditional((card.arm, card) for card in pooled(contents))
    series = tuple(replace(one, look=look[one.name]) for one in series)
    sentence = "Share of proposed tokens that stand, by position, of the rounds in which all earlier ones stood."
    return _positions("acceptance-drafts", "Acceptance by position, all drafts", sentence, series)


def positions_by_temperature(contents: Contents) -> list[Chart]:
    """Conditional acceptance of the winner, by temperature."""
    cards = [(t, find_card(contents.cards, contents.winner, temperature=t)) for t in contents.temperatures]
    series = _conditional((f"temperature {t:g}", card) for t, card in cards)
    sentence = f"The same for {contents.winner}, at each temperature."
    return _positions("acceptance-temperatures", f"Acceptance by position, {contents.winner}", sentence, series)


def _domains(contents: Contents) -> list[str]:
    return list(dict.fromkeys(c.domain for c in contents.cards if c.arm == contents.winner and c.domain != OVERALL))


def _of_winner(contents: Contents, value: Callable[[Scorecard], Estimate | None]) -> tuple[Series, ...]:
    """A figure of the winner over domains, one series a temperature."""
    domains = _domains(contents)
    found = {(c.domain, c.temperature): value(c) for c in contents.cards if c.arm == contents.winner}
    return tuple(
        named(f"temperature {t:g}", [(i, e) for i, d in enumerate(domains) if (e := found.get((d, t))) is not None])
        for t in contents.temperatures
    )


def acceptance_by_domain(contents: Contents) -> list[Chart]:
    """Acceptance of the winner by domain and temperature."""
    series = _of_winner(contents, lambda card: card.alpha)
    return _over_domains(contents, series, "acceptance-domains", "Acceptance", "accepted / proposed tokens")


def speedup_by_domain(contents: Contents) -> list[Chart]:
    """Speedup of the winner by domain and temperature."""
    if contents.winner == BASELINE:
        return []
    series = _of_winner(contents, lambda card: card.speedup)
    return _over_domains(
        contents, series, "speedup-domains", "Speedup", "speedup over target-only decoding", reference=1.0
    )


def _over_domains(
    contents: Contents, series: tuple[Series, ...], key: str, what: str, label: str, *, reference: float | None = None
) -> list[Chart]:
    if not any(one.x for one in series):
        return []
    return [
        Chart(
            key=key,
            title=f"{what} by domain, {contents.winner}",
            sentence=f"{what} of {contents.winner} in each domain, at each temperature.",
            kind=FOREST,
            x_label=label,
            y_label="domain",
            series=series,
            categories=tuple(_domains(contents)),
            reference=reference,
        )
    ]


def reliability(contents: Contents) -> list[Chart]:
    """Reliability diagrams of the winner, one a position, before and after calibration."""
    return [
        Chart(
            key=f"reliability-{at.position}",
            title=f"Position {at.position}",
            sentence=f"Calibration error {at.error_before.value:.3f} before and {at.error_after.value:.3f} after "
            f"calibration, over {at.proposed} rounds.",
            kind=LINES,
            x_label="predicted chance",
            y_label="observed share",
            series=(_bins("as the draft states it", at.before), _bins("calibrated", at.after)),
            path=DIAGONAL,
            unit_square=True,
        )
        for at in contents.calibrations.get(contents.winner, [])
    ]


def _bins(name: str, bins: Iterable[Bin]) -> Series:
    return named(name, [(bin_.predicted, exact(bin_.observed)) for bin_ in bins])


def learning(contents: Contents) -> list[Chart]:
    """Loss and acceptance by step of the winner's training, on the training and the evaluation data."""
    found = []
    for key, label in (("loss", "loss"), ("acceptance", "estimated acceptance")):
        names = {"training": key, "evaluation": f"eval/{key}"}
        series = tuple(
            # A step without a finite loss is written as a word, and has no place in a drawing.
            named(name, [(row["step"], exact(value)) for row in contents.curve if _finite(value := row.get(column))])
            for name, column in names.items()
        )
        drawn = tuple(one for one in series if one.x)
        if drawn:
            last = ", ".join(f"{one.name} {one.y[-1].value:.3f}" for one in drawn)
            found.append(
                Chart(
                    key=f"learning-{key}",
                    title=f"{key.capitalize()} by step, {contents.winner}",
                    sentence=f"At the last step: {last}.",
                    kind=LINES,
                    x_label="step",
                    y_label=label,
                    series=drawn,
                    digits=3,
                )
            )
    return found


def learning_curve(contents: Contents) -> list[Chart]:
    """Expected tau by step of the winner's training, with a fitted curve and what lies ahead of it."""
    points = measured(contents.curve)
    if len(points) < 2:
        return []
    at, values = [p.step for p in points], [p.tau for p in points]
    block = proposed(contents.curve)
    fit = fit_curve(at, values, most=1.0 + block if block else math.inf)
    series = [named("evaluations", zip(at, map(exact, values), strict=True))]
    sentence = f"At the last of {len(at)} evaluations: {values[-1]:.3f}."
    if fit is not None:
        ahead = [(factor * at[-1], fit.estimate(factor * at[-1])) for factor in AHEAD]
        series.append(named("fitted", [*((n, exact(min(fit.value(n), fit.most))) for n in at), *ahead]))
        sentence += (
            f" Fitted is a - b * steps^-{fit.power:.2f}; at {AHEAD[0]:g} times the steps {shown(ahead[0][1])}, at most "
            f"{shown(fit.estimate(math.inf))}, for trainings whose rate falls as this one's did."
        )
    return [
        Chart(
            key="learning-curve",
            title=f"Expected tau by step, {contents.winner}",
            sentence=sentence,
            kind=LINES,
            x_label="step",
            y_label="tau, teacher-forced",
            series=tuple(series),
            digits=3,
        )
    ]


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def gates(contents: Contents) -> list[Chart]:
    """Speed of each re-alignment's draft over the champion it was compared with, by outcome, over time."""
    measured = [one for one in contents.cycles if "speed_ratio" in one.figures]
    if not measured:
        return []
    first = datetime.fromisoformat(measured[0].ended)
    days = [(datetime.fromisoformat(one.ended) - first).total_seconds() / 86400 for one in measured]
    outcomes = dict.fromkeys(one.outcome for one in measured)
    return [
        Chart(
            key="gates",
            title="Re-alignments",
            sentence=f"Speed of each new draft over the one in use, in days since {measured[0].ended[:10]}.",
            kind=LINES,
            x_label=f"days since {measured[0].ended[:10]}",
            y_label="speed over the champion",
            series=tuple(
                named(
                    outcome.replace("_", " "),
                    [
                        (day, exact(float(one.figures["speed_ratio"])))
                        for day, one in zip(days, measured, strict=True)
                        if one.outcome == outcome
                    ],
                )
                for outcome in outcomes
            ),
            reference=1.0,
        )
    ]
