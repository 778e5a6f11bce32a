"""A load for people: a page of tables and a picture. Computes no figure of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference.batch.costs import LoadCosts
from inference.batch.load import BATCH, CLOSED, POISSON, Point
from inference.batch.load_figures import GENERATE, SCHEDULED, Claims, LoadFigure
from inference.statistics import BASELINE, Estimate
from pipelines.files import replacing
from pipelines.report import interval, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("black", "tab:cyan", "tab:olive", "tab:pink", "tab:purple", "tab:brown", "tab:gray", "tab:green")

_WORK = "the target's passes nor into drafting"
_CAPTURED_WORK = "captured rounds nor into reading prompts, by the device's clock"
_COSTS = (
    "a pass by tokens a request (lower quartile, and how far above it the median lies), fitted so that more tokens "
    "never cost less; drafting for all requests."
)
_CAPTURED_COSTS = "replays of captured rounds of the draft, whole, by places and tokens proposed (lower quartile)."
_CAPTURED = (
    "All but `generate` went by captured rounds, target-only decoding as well; a request that ends is found out, and "
    "replaced, a round later. All requests of a round propose equally many tokens there: `scheduled` takes the number "
    "with the most expected tokens a second, by the replays below and what was accepted so far.\n\n"
)


def point_name(point: Point) -> str:
    """A load in words."""
    if point.kind == POISSON:
        return f"arrivals at {point.share:g} of capacity"
    return f"{'closed loop' if point.kind == CLOSED else 'one batch'} of {point.concurrency}"


def load_markdown(
    figures: Sequence[LoadFigure],
    found: Claims,
    hoped: Mapping[int, tuple[int, float]],
    costs: Mapping[str, LoadCosts],
    *,
    draft: str,
    captured: bool = False,
) -> str:
    """The whole page: what the policy is worth, closed loops, arrivals, and the engine beside `generate`.

    Args:
        figures: of every arm at every load.
        found: what they say.
        hoped: by concurrency, the fixed length that the measured parts make best, and its ratio to target-only.
        costs: what the scheduler went by, by arithmetic.
        draft: its name.
        captured: whether all arms but `generate` went by captured rounds.
    """
    closed, arrivals, batches = (_of(figures, kind) for kind in (CLOSED, POISSON, BATCH))
    text = [
        f"# {draft} under load\n\n",
        "Intervals are 95 % bootstraps over blocks of requests; in a block all arms had the same requests, in shuffled "
        "order. The best fixed length is the one that came out best over all blocks of a load, which favours it.\n\n",
        _CAPTURED if captured else "",
        "".join(f"- {line}\n" for line in claim_lines(figures, found)),
        "\n## Closed loops\n\nEach request that ends is replaced at once. Throughput counts while every place is "
        "taken; milliseconds between tokens are median / 95th percentile, and a round that emits three tokens gives "
        "three gaps of a third.\n\n",
        _closed(closed),
        "\n## What there is to gain\n\nBy the measured passes, drafting and acceptance of validation prompts: the "
        "fixed length that would be best if requests were all alike and contexts cost nothing, and its throughput "
        "over target-only.\n\n",
        _hoped(closed, hoped),
    ]
    if arrivals:
        text += [
            "\n## Poisson arrivals\n\nArrivals a second, as a share of the requests that target-only decoding served "
            "in its best closed loop. Milliseconds, median / 95th percentile; the first tokens and the total count "
            "from the arrival, waiting included.\n\n",
            _arrivals(arrivals),
        ]
    if batches:
        text += [
            "\n## Beside transformers' generate\n\nAll requests at once, target-only and greedy, on one loaded model: "
            "padded on the left with transformers' own attention, and "
            f"{'by captured rounds' if captured else 'in the batch engine'}.\n\n",
            _batches(batches, captured=captured),
        ]
    text += [
        "\n## Outside tensor work\n\nMilliseconds of a round, and what of it went neither into "
        f"{_CAPTURED_WORK if captured else _WORK}; the latter also for each request.\n\n",
        _outside([*closed, *batches]),
        "\n## What a round costs\n\nMeasured once before, in milliseconds: "
        f"{_CAPTURED_COSTS if captured else _COSTS}\n",
    ]
    tables = {name: _rounds(cost) if captured else cost.table() for name, cost in costs.items()}
    text += [f"\n{name}\n\n{markdown_table(header, rows)}" for name, (header, *rows) in tables.items()]
    return "".join(text)


def _rounds(costs: LoadCosts) -> list[list[str]]:
    """Captured rounds, by places and tokens proposed: a header, then milliseconds."""
    first = next(iter(costs.passes.values()))
    rows = [
        [str(places), *(f"{1e3 * seconds:.2f}" for seconds in row.values())] for places, row in costs.passes.items()
    ]
    return [["places", "none proposed", *(str(length) for length in range(1, len(first)))], *rows]


def _of(figures: Sequence[LoadFigure], kind: str) -> list[LoadFigure]:
    return [figure for figure in figures if figure.point.kind == kind]


def claim_lines(figures: Sequence[LoadFigure], found: Claims) -> list[str]:
    """What the load was run to find out, a line each."""
    slower = f"yes, at {_list(found.below_fixed)}" if found.below_fixed else "no"
    worse = f"yes, at {_list(found.below_none)}" if found.below_none else "no"
    beside = {f.point.concurrency: f for f in _of(figures, BATCH) if f.arm == GENERATE}
    own = {f.point.concurrency: f for f in _of(figures, BATCH) if f.arm == BASELINE}
    return [
        f"Is `scheduled` surely slower than the best fixed length anywhere? {slower}.",
        f"Is it faster by a tenth at least? At {len(found.well_above)} of {len(found.loads)} concurrencies"
        f"{f' ({_list(found.well_above)})' if found.well_above else ''}.",
        f"Is it surely slower than target-only decoding anywhere? {worse}.",
        *(
            f"Target-only, one batch of {size}: {inverse(beside[size].over_none)} of the throughput of transformers' "
            f"generate; {own[size].outside_request_ms:.1f} ms a request outside the target's passes."
            for size in sorted(beside)
        ),
    ]


def inverse(ratio: Estimate) -> Estimate:
    """The other way round: quantiles of a ratio turn into those of its inverse."""
    return Estimate(1.0 / ratio.value, ratio.high and 1.0 / ratio.high, ratio.low and 1.0 / ratio.low)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _closed(figures: Sequence[LoadFigure]) -> str:
    header = ["requests", "arm", "precision", "blocks", "tokens/s", "over none", "over best fixed"]
    header += ["length", "tau", "alpha", "ms a token", "ms a token, by request", "mismatches"]
    rows = [
        [
            str(f.point.concurrency),
            f"{f.arm} (best)" if f.best_fixed else f.arm,
            f.precision,
            str(f.blocks),
            interval(f.tokens_per_s),
            interval(f.over_none),
            interval(f.over_fixed),
            f"{f.mean_length:.2f}",
            f"{f.tau:.2f}",
            "-" if f.alpha is None else f"{f.alpha:.2f}",
            _pair(f.token_ms),
            _pair(f.request_token_ms),
            f"{f.mismatches}, unexplained {f.unexplained}" if f.unexplained else str(f.mismatches),
        ]
        for f in figures
    ]
    return markdown_table(header, rows)


def _hoped(figures: Sequence[LoadFigure], hoped: Mapping[int, tuple[int, float]]) -> str:
    best = {f.point.concurrency: f for f in figures if f.best_fixed}
    mine = {f.point.concurrency: f for f in figures if f.arm == SCHEDULED}
    rows = [
        [
            str(concurrency),
            str(tokens),
            f"{gain:.2f}",
            best[concurrency].arm,
            interval(best[concurrency].over_none),
            f"{mine[concurrency].mean_length:.2f}",
            interval(mine[concurrency].over_none),
        ]
        for concurrency, (tokens, gain) in sorted(hoped.items())
    ]
    header = ["requests", "length foretold", "over none, foretold", "best fixed", "over none", "scheduled", "over none"]
    return markdown_table(header, rows)


def _arrivals(figures: Sequence[LoadFigure]) -> str:
    header = ["share", "arm", "blocks", "tokens/s", "length", "first tokens", "a token", "total"]
    rows = [
        [
            f"{f.point.share:g}",
            f.arm,
            str(f.blocks),
            interval(f.tokens_per_s),
            f"{f.mean_length:.2f}",
            _pair(f.first_ms, digits=0),
            _pair(f.token_ms),
            _pair(f.total_ms, digits=0),
        ]
        for f in figures
    ]
    return markdown_table(header, rows)


def _batches(figures: Sequence[LoadFigure], *, captured: bool) -> str:
    header = ["requests", "arm", "precision", "blocks", "tokens/s", "over generate", "mismatches"]
    beside = {f.point.concurrency: f for f in figures if f.arm == GENERATE}
    names = {BASELINE: "captured rounds" if captured else "batch engine", GENERATE: "transformers' generate"}
    rows = [
        [
            str(f.point.concurrency),
            names[f.arm],
            f.precision,
            str(f.blocks),
            interval(f.tokens_per_s),
            "-" if f.arm == GENERATE else interval(inverse(beside[f.point.concurrency].over_none)),
            f"{f.mismatches}, unexplained {f.unexplained}" if f.unexplained else str(f.mismatches),
        ]
        for f in figures
    ]
    return markdown_table(header, rows)


def _outside(figures: Sequence[LoadFigure]) -> str:
    rows = [
        [
            point_name(f.point),
            f.arm,
            f"{f.round_ms:.1f}",
            f"{f.outside_round_ms:.2f}",
            f"{f.outside_request_ms:.1f}",
        ]
        for f in figures
    ]
    return markdown_table(["load", "arm", "ms a round", "outside, a round", "outside, a request"], rows)


def _pair(values: tuple[float, float] | None, *, digits: int = 1) -> str:
    return "-" if values is None else f"{values[0]:.{digits}f} / {values[1]:.{digits}f}"


def load_plot(figures: Sequence[LoadFigure], path: Path) -> None:
    """Draw throughput, length chosen and time between tokens of closed loops against concurrency.

    Args:
        figures: those of closed loops are drawn.
        path: PNG to write, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    closed = _of(figures, CLOSED)
    figure, (speed, length, gaps) = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for number, arm in enumerate(dict.fromkeys(f.arm for f in closed)):
        mine = [f for f in closed if f.arm == arm]
        colour = "tab:red" if arm == SCHEDULED else _COLOURS[number % len(_COLOURS)]
        _speed(speed, mine, arm, colour)
        if arm in (BASELINE, SCHEDULED):
            _gaps(gaps, mine, arm, colour)
    best = [f for f in closed if f.best_fixed]
    _gaps(gaps, best, "best fixed", "tab:blue")
    for chosen, name, colour in (
        ([f for f in closed if f.arm == SCHEDULED], "scheduled, mean", "tab:red"),
        (best, "best fixed", "tab:blue"),
    ):
        lengths = [f.mean_length if f.arm == SCHEDULED else float(f.arm.rpartition("-")[2]) for f in chosen]
        length.plot([f.point.concurrency for f in chosen], lengths, marker="o", label=name, color=colour)
    speed.set_ylabel("tokens a second")
    length.set_ylabel("tokens proposed a round")
    length.set_ylim(bottom=0)
    gaps.set_ylabel("ms between tokens (solid: median, dashed: 95 %)")
    for panel in (speed, length, gaps):
        _against_concurrency(panel, sorted({f.point.concurrency for f in closed}))
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)


def _speed(panel: "Axes", figures: Sequence[LoadFigure], arm: str, colour: str) -> None:
    """One arm with its intervals; without one where there is none."""
    values = [f.tokens_per_s for f in figures]
    below = [0.0 if e.low is None else e.value - e.low for e in values]
    above = [0.0 if e.high is None else e.high - e.value for e in values]
    panel.errorbar(
        [f.point.concurrency for f in figures],
        [e.value for e in values],
        yerr=[[max(0.0, d) for d in below], [max(0.0, d) for d in above]],
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=2.0 if arm == SCHEDULED else 1.0,
        color=colour,
        label=arm,
    )


def _gaps(panel: "Axes", figures: Sequence[LoadFigure], arm: str, colour: str) -> None:
    """Median and 95th percentile of one arm."""
    shown = [(f.point.concurrency, f.token_ms) for f in figures if f.token_ms is not None]
    at = [concurrency for concurrency, _ in shown]
    panel.plot(at, [middle for _, (middle, _) in shown], marker="o", markersize=4, color=colour, label=arm)
    panel.plot(at, [high for _, (_, high) in shown], linestyle="--", color=colour)


def _against_concurrency(panel: "Axes", ticks: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_xlabel("requests kept running")
    panel.legend(fontsize="small")
