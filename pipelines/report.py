"""Scorecards for people: a table and a picture. Computes no figure of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from inference.block_length import BlockChoice
from inference.draft_parts import PARTS as DRAFT_PARTS
from inference.statistics import OVERALL, Estimate, Scorecard

_LINE_STYLES = ("-", "--", ":", "-.")


def scorecard_rows(cards: list[Scorecard]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary: every arm, domain and temperature."""
    header = ["draft", "domain", "T", "requests", "tau", "alpha", "speedup", "expected", "tokens/s", "draft MiB"]
    rows = [
        [
            card.arm,
            card.domain,
            _temperature(card),
            str(card.requests),
            interval(card.tau),
            interval(card.alpha),
            interval(card.speedup),
            f"{card.expected_speedup.value:.2f}",
            f"{card.tokens_per_s.value:.1f}",
            f"{card.draft_bytes / 2**20:.0f}",
        ]
        for card in cards
    ]
    return header, rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def interval(estimate: Estimate | None) -> str:
    """A figure and its interval, or a dash."""
    return "-" if estimate is None else str(estimate)


def scorecard_markdown(
    cards: list[Scorecard], blocks: Mapping[str, BlockChoice], draft_parts: Mapping[str, Mapping[str, float]]
) -> str:
    """The whole scorecard as Markdown: summary, acceptance by position, seconds by part.

    Args:
        cards: of all arms.
        blocks: by draft.
        draft_parts: seconds of drafting a block by part, of drafts that tell; see `inference.draft_parts`.
    """
    header, rows = scorecard_rows(cards)
    overall = [card for card in cards if card.domain == OVERALL]
    sections = [
        "# Scorecard\n\ntau counts the bonus token; intervals are 95 % bootstraps over prompts.\n\n"
        + markdown_table(header, rows),
        _positions_section([card for card in overall if card.arm in blocks], blocks),
        _parts_section(overall),
    ]
    if draft_parts:
        sections.append(_drafting_section(blocks, draft_parts))
    return "\n".join(sections)


def _temperature(card: Scorecard) -> str:
    return "all" if card.temperature is None else f"{card.temperature:g}"


def _positions_section(cards: list[Scorecard], blocks: Mapping[str, BlockChoice]) -> str:
    positions = max((len(card.conditional) for card in cards), default=0)
    rows = [
        [
            card.arm,
            _temperature(card),
            blocks[card.arm].shape,
            *(f"{e.value:.2f}" for e in card.conditional),
            *("-" for _ in range(positions - len(card.conditional))),
        ]
        for card in cards
    ]
    return (
        "## Conditional acceptance by position (all domains)\n\nOf the chain's own tokens; a block of 2+(3,1) offers "
        "three more tokens beside its first and one beside its second. Where a tree was chosen, greedy rounds propose "
        "it, sampled ones where it was chosen for them too, and a position is any of its tokens that deep, drafted or "
        "copied.\n\n" + markdown_table(["draft", "T", "block", *(str(k + 1) for k in range(positions))], rows)
    )


def _parts_section(cards: list[Scorecard]) -> str:
    parts = list(cards[0].seconds) if cards else []
    rows = [
        [
            card.arm,
            _temperature(card),
            *(f"{1e3 * card.seconds[part]:.1f}" for part in parts),
            f"{card.efficiency.value:.2f}",
            str(card.mismatches),
        ]
        for card in cards
    ]
    title = "## Milliseconds per target pass by part (all domains; prefill per request)\n\n"
    return title + markdown_table(["draft", "T", *parts, "efficiency", "mismatches"], rows)


def _drafting_section(blocks: Mapping[str, BlockChoice], draft_parts: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        [name, str(blocks[name].tokens), *(f"{1e3 * parts[part]:.2f}" for part in DRAFT_PARTS)]
        for name, parts in draft_parts.items()
    ]
    return (
        "## Milliseconds of drafting a block by part\n\nReading one verified token's features; what all slots share; "
        "what runs once a slot; drawing the tokens.\n\n" + markdown_table(["draft", "tokens", *DRAFT_PARTS], rows)
    )


def scorecard_plot(cards: list[Scorecard], path: Path) -> None:
    """Draw speedup by draft and domain with intervals, and acceptance by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4), constrained_layout=True)
    pooled = [card for card in cards if card.temperature is None]
    arms = list(dict.fromkeys(card.arm for card in pooled))
    domains = list(dict.fromkeys(card.domain for card in pooled))
    width = 0.8 / len(domains)
    for offset, domain in enumerate(domains):
        of_domain = {card.arm: card for card in pooled if card.domain == domain}
        shown = [(i, of_domain[arm].speedup) for i, arm in enumerate(arms) if arm in of_domain]
        left.bar(
            [i + (offset - (len(domains) - 1) / 2) * width for i, _ in shown],
            [e.value for _, e in shown],
            width,
            label=domain,
            yerr=[_error_bars([e for _, e in shown], side="low"), _error_bars([e for _, e in shown], side="high")],
            capsize=2,
        )
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set_xticks(range(len(arms)), arms)
    left.set_ylabel("speedup over target-only decoding")
    left.legend(fontsize="small")
    temperatures = list(dict.fromkeys(card.temperature for card in cards if card.temperature is not None))
    for card in cards:
        if card.domain == OVERALL and card.temperature is not None and card.conditional:
            values = [e.value for e in card.conditional]
            # A colour a draft, a line style a temperature: curves to compare are told apart however many there are.
            right.plot(
                range(1, len(values) + 1),
                values,
                marker="o",
                color=f"C{arms.index(card.arm)}",
                linestyle=_LINE_STYLES[temperatures.index(card.temperature) % len(_LINE_STYLES)],
                label=f"{card.arm}, T={card.temperature:g}",
            )
    right.set_xlabel("position in the block")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylabel("acceptance, given the earlier ones")
    right.set_ylim(0, 1)
    if right.lines:  # nothing was proposed when target-only decoding was the only arm
        right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _error_bars(estimates: list[Estimate], *, side: Literal["low", "high"]) -> list[float]:
    """Lengths of the bars below or above the values; none where there is no interval."""
    ends = [estimate.low if side == "low" else estimate.high for estimate in estimates]
    return [0.0 if end is None else abs(e.value - end) for e, end in zip(estimates, ends, strict=True)]
