"""The staleness of a draft for people: `staleness.json`, `.md` and `.png`. Measures nothing."""

from collections.abc import Sequence
from pathlib import Path

from inference.statistics import Estimate
from inference.target import target_digest
from pipelines.files import content_digest, replacing, write_json, write_text
from pipelines.report import markdown_table
from pipelines.staleness import DOMAIN, OTHERS, TEMPERATURES, Point, Settings

REPORT = "staleness"
_COLORS = {DOMAIN: "tab:red", "code": "tab:blue", "chat": "tab:green"}


def write_report(points: Sequence[Point], out: Path, *, settings: Settings, base: Path, draft: Path) -> None:
    """Write `staleness.json`, `.md` and `.png`."""
    data = {
        "settings": settings,
        "base": {"name": base.name, "digest": target_digest(base)},
        "draft": {"name": draft.name, "digest": content_digest(draft)},
        "domain": DOMAIN,
        "points": points,
    }
    write_json(out / f"{REPORT}.json", data)
    write_text(out / f"{REPORT}.md", staleness_markdown(points))
    staleness_plot(points, out / f"{REPORT}.png")


def staleness_markdown(points: Sequence[Point]) -> str:
    """A table for every temperature."""
    text = (
        f"# Staleness of a draft whose target is fine-tuned on {DOMAIN}\n\n"
        "tau counts the bonus token; in brackets 95 % bootstraps over prompts. Changes are relative to step 0, on the "
        "same prompts.\n"
    )
    domains = (DOMAIN, *OTHERS)
    for temperature in TEMPERATURES:
        header = [
            "steps",
            "train loss",
            "probe loss",
            *(f"tau {d}" for d in domains),
            *(f"change {d}" for d in domains),
        ]
        rows = []
        for point in points:
            taus = [point.tau(domain, temperature) for domain in domains]
            losses = ["-" if x is None else f"{x:.3f}" for x in (point.train_loss, point.probe_loss)]
            changes = [_percent(t.change) if point.step else "-" for t in taus]
            rows.append([str(point.step), *losses, *(str(t.tau) for t in taus), *changes])
        text += f"\n## Temperature {temperature:g}\n\n{markdown_table(header, rows)}"
    return text


def _percent(change: Estimate) -> str:
    ends = "" if change.low is None or change.high is None else f" [{change.low:+.1%}, {change.high:+.1%}]"
    return f"{change.value:+.1%}{ends}"


def staleness_plot(points: Sequence[Point], path: Path) -> None:
    """Draw tau over fine-tuning steps by domain, with intervals; dashed at temperature 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    steps = [point.step for point in points]
    for domain in (DOMAIN, *OTHERS):
        for temperature, style in zip(TEMPERATURES, ("-", "--"), strict=True):
            found = [point.tau(domain, temperature).tau for point in points]
            label = f"{domain}, T={temperature:g}"
            panel.plot(steps, [e.value for e in found], style, marker="o", ms=4, color=_COLORS[domain], label=label)
            if temperature == 0.0:
                ends = [(e.value if e.low is None else e.low, e.value if e.high is None else e.high) for e in found]
                low, high = zip(*ends, strict=True)
                panel.fill_between(steps, low, high, color=_COLORS[domain], alpha=0.15, linewidth=0)
    panel.set_xlabel(f"fine-tuning steps of the target on {DOMAIN}")
    panel.set_ylabel("tau of the unchanged draft")
    panel.legend(fontsize="small")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
    pyplot.close(figure)


__all__ = ["REPORT", "staleness_markdown", "staleness_plot", "write_report"]
