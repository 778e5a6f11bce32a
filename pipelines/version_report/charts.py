"""Which figures a report has: one definition for the page, the pictures and the tables below them."""

from collections.abc import Callable

from pipelines.version_report.chart import Chart
from pipelines.version_report.charts_draft import (
    acceptance_by_domain,
    gates,
    learning,
    learning_curve,
    positions_by_draft,
    positions_by_temperature,
    reliability,
    speedup_by_domain,
)
from pipelines.version_report.charts_speed import by_memory, by_training, prefill, seconds, speedups, under_load
from pipelines.version_report.contents import Contents


def charts(contents: Contents) -> dict[str, list[Chart]]:
    """All figures of a report by section; a section without data has none."""
    makers: dict[str, tuple[Callable[[Contents], list[Chart]], ...]] = {
        "speed": (speedups, by_memory, by_training),
        "acceptance": (positions_by_draft, positions_by_temperature, acceptance_by_domain),
        "domains": (speedup_by_domain,),
        "reliability": (reliability,),
        "learning": (learning, learning_curve),
        "seconds": (seconds, prefill),
        "load": (under_load,),
        "history": (gates,),
    }
    return {name: [chart for make in chosen for chart in make(contents)] for name, chosen in makers.items()}
