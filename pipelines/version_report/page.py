"""The report as one HTML file: no script, nothing from elsewhere, every text from a model or a configuration escaped.

write_report(Path("registry/smollm2-135m/v1"), registry=Path("registry"))
"""

import itertools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.advice import advise
from pipelines.files import write_text
from pipelines.version_report import tables
from pipelines.version_report.charts import charts
from pipelines.version_report.contents import Contents, read_contents
from pipelines.version_report.drawing import ROLES, SERIES, svg
from pipelines.version_report.examples import ACCEPTED, REJECTED, Example, Token

REPORT_FILE = "report.html"
_TEMPLATE, _STYLE = "page.html.j2", "page.css"
_SECTIONS = (
    ("advice", "Advice"),
    ("candidates", "Candidates"),
    ("speed", "Speed against cost"),
    ("acceptance", "Acceptance"),
    ("domains", "Domains and temperatures"),
    ("seconds", "Where the time goes"),
    ("load", "Many requests at once"),
    ("cost", "Cost"),
    ("examples", "Worked examples"),
    ("reliability", "Calibration"),
    ("learning", "Training"),
    ("stages", "What the run took"),
    ("history", "History"),
    ("use", "Use"),
    ("lineage", "Lineage"),
)


def write_report(version_folder: Path, *, registry: Path | None) -> None:
    """Write `report.html` into a version folder, from its files alone and the registry's log and re-alignments.

    Args:
        version_folder: whole but for the report, under any name.
        registry: root of the registry; None leaves the history out.

    Raises:
        InputError: the folder holds no whole version, or cannot be written.
    """
    write_text(version_folder / REPORT_FILE, render(read_contents(version_folder, registry=registry)))


def render(contents: Contents) -> str:
    """The page."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = lambda chart: Markup(svg(chart))
    return environment.get_template(_TEMPLATE).render(_words(contents), style=_style(here / _STYLE))


def _style(path: Path) -> Markup:
    """The style sheet, our own, with the colours of the charts."""
    colours = "".join(f"{name}:{colour};" for name, colour in {**ROLES, **SERIES}.items())
    return Markup(f":root{{{colours}}}\n{path.read_text(encoding='utf-8')}")


def _words(contents: Contents) -> dict[str, Any]:
    """Everything the template shows."""
    figures = charts(contents)
    costs, history, training = tables.costs(contents), tables.history(contents), tables.training(contents)
    present = {
        "reliability": bool(contents.calibrations),
        "learning": bool(figures["learning"]) or training is not None,
        "load": bool(figures["load"]),
        "examples": bool(contents.examples),
        "stages": bool(contents.stages),
        "history": history is not None,
    }
    return {
        "title": f"{contents.info.get('name', '')} {contents.info.get('version', '')}".strip(),
        "created": str(contents.info.get("created", "")),
        "target": tables.target_name(contents),
        "winner": contents.winner,
        "verdict": tables.verdict(contents),
        "reason": contents.decision.reason,
        "key_figures": tables.key_figures(contents),
        "sections": [(key, title) for key, title in _SECTIONS if present.get(key, True)],
        "charts": figures,
        "advice": advise(contents.cards, winner=contents.winner, load=contents.load),
        "candidates": tables.candidates(contents),
        "domains": tables.domains(contents),
        "calibration": tables.calibration(contents),
        "chances": tables.chances(contents),
        "costs": costs,
        "price": contents.price_per_hour,
        "training": training,
        "stages": tables.stages(contents),
        "history": history,
        "lineage": tables.lineage(contents),
        "commands": tables.commands(contents.location),
        "exports": tables.exports(contents),
        "examples": [(example, rounds(example)) for example in contents.examples],
        "location": contents.location,
    }


def rounds(example: Example) -> list[tuple[str, list[Token]]]:
    """The tokens of an example by target pass, each with what became of its proposals."""
    found = []
    for number, group in itertools.groupby(example.tokens, key=lambda token: token.round):
        tokens = list(group)
        stood = sum(token.kind == ACCEPTED for token in tokens)
        proposed = stood + sum(token.kind == REJECTED for token in tokens)
        found.append((f"pass {number}: {stood} of {proposed} proposed tokens stand", tokens))
    return found
