"""Figures of speed and what it costs: speedups, the frontiers, seconds by part, many requests at once."""

from collections.abc import Callable, Iterable, Sequence

from inference.batch.load import CLOSED
from inference.batch.load_figures import SCHEDULED
from inference.request import PARTS
from inference.statistics import BASELINE, OVERALL, Estimate, Scorecard, find_card
from pipelines.version_report.chart import (
    BARS,
    FOREST,
    LINES,
    MIB,
    POINTS,
    STACKED,
    Chart,
    Series,
    exact,
    looks,
    named,
    pooled,
)
from pipelines.version_report.contents import Contents


def speedups(contents: Contents) -> list[Chart]:
    """Speedup of every draft, by temperature."""
    drafts = [card.arm for card in pooled(contents) if card.arm != BASELINE]
    if not drafts:
        return []
    best = find_card(contents.cards, drafts[0])
    return [
        Chart(
            key="speedup",
            title="Speedup of every draft",
            sentence=f"The fastest draft, {best.arm}, decodes {best.speedup} times as fast as target-only decoding.",
            kind=FOREST,
            x_label="speedup over target-only decoding",
            y_label="draft",
            series=_by_temperature(contents, drafts, OVERALL, lambda card: card.speedup),
            categories=tuple(drafts),
            reference=1.0,
        )
    ]


def _by_temperature(
    contents: Contents, drafts: Sequence[str], domain: str, value: Callable[[Scorecard], Estimate]
) -> tuple[Series, ...]:
    """One series a temperature, over drafts; drafts that were not scored there are left out."""
    cards = {(c.arm, c.temperature): c for c in contents.cards if c.domain == domain}
    return tuple(
        named(
            f"temperature {temperature:g}",
            [(i, value(cards[arm, temperature])) for i, arm in enumerate(drafts) if (arm, temperature) in cards],
        )
        for temperature in contents.temperatures
    )


def by_memory(contents: Contents) -> list[Chart]:
    """Speedup against memory, target-only decoding at no memory."""
    points = [(card.arm, card.draft_bytes / MIB, card.speedup) for card in pooled(contents)]
    return _against(
        contents, points, key="speedup-memory", title="Speedup against memory", label="memory of the draft, MiB"
    )


def by_training(contents: Contents) -> list[Chart]:
    """Speedup against seconds of training, of the drafts whose training is known."""
    known = {arm: float(data["seconds"]) for arm, data in contents.training.items() if "seconds" in data}
    points = [(card.arm, known[card.arm], card.speedup) for card in pooled(contents) if card.arm in known]
    if not points:
        return []
    points.append((BASELINE, 0.0, exact(1.0)))
    return _against(
        contents,
        points,
        key="speedup-training",
        title="Speedup against training",
        label="seconds of training on its machine",
    )


def _against(
    contents: Contents, points: list[tuple[str, float, Estimate]], *, key: str, title: str, label: str
) -> list[Chart]:
    """Speedup against a cost, with the frontier: what no cheaper draft reaches."""
    if len(points) < 2:
        return []
    look = looks(contents)
    best = frontier([(cost, speedup.value) for _, cost, speedup in points])
    on = [name for name, cost, speedup in points if (cost, speedup.value) in best]
    return [
        Chart(
            key=key,
            title=title,
            sentence=f"No cheaper draft is as fast as these: {', '.join(on)} (the dashed line).",
            kind=POINTS,
            x_label=label,
            y_label="speedup",
            series=tuple(named(name, [(cost, speedup)], look=look[name]) for name, cost, speedup in points),
            reference=1.0,
            path=tuple(best),
        )
    ]


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain) those that no other point beats at the same cost or less, cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def seconds(contents: Contents) -> list[Chart]:
    """Milliseconds of a target pass by part, every draft."""
    cards = pooled(contents)
    parts = [part for part in PARTS if part != "prefill"]
    own = find_card(contents.cards, contents.winner)
    told = ", ".join(f"{part} {1e3 * own.seconds[part]:.1f}" for part in parts)
    return [
        Chart(
            key="seconds",
            title="Milliseconds of a round, by part",
            sentence=f"A round of {contents.winner} in milliseconds: {told}.",
            kind=STACKED,
            x_label="milliseconds per target pass",
            y_label="draft",
            series=tuple(
                named(part, [(i, exact(1e3 * card.seconds[part])) for i, card in enumerate(cards)]) for part in parts
            ),
            categories=tuple(card.arm for card in cards),
        )
    ]


def prefill(contents: Contents) -> list[Chart]:
    """Milliseconds of the prefill of a request, every draft."""
    cards = pooled(contents)
    own = find_card(contents.cards, contents.winner)
    return [
        Chart(
            key="prefill",
            title="Prefill of a request",
            sentence=f"Before its first round a request takes {1e3 * own.seconds['prefill']:.0f} ms with "
            f"{contents.winner}.",
            kind=BARS,
            x_label="milliseconds per request",
            y_label="draft",
            series=(named("prefill", [(i, exact(1e3 * card.seconds["prefill"])) for i, card in enumerate(cards)]),),
            categories=tuple(card.arm for card in cards),
            digits=0,
        )
    ]


def under_load(contents: Contents) -> list[Chart]:
    """Throughput over target-only decoding against the number of requests at once."""
    closed = [f for f in contents.load if f.point.kind == CLOSED]
    scheduled = [(f.point.concurrency, f.over_none) for f in closed if f.arm == SCHEDULED]
    fixed = [(f.point.concurrency, f.over_none) for f in closed if f.best_fixed]
    series = tuple(one for one in (named("scheduled", scheduled), named("best fixed length", fixed)) if one.x)
    if not series:
        return []
    return [
        Chart(
            key="load",
            title="Many requests at once",
            sentence="Throughput over target-only decoding, by requests kept running.",
            kind=LINES,
            x_label="requests at once",
            y_label="throughput over target-only",
            series=series,
            reference=1.0,
            whole_x=True,
        )
    ]
