"""A plan as tables for people and as JSON. It computes nothing but sums."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.files import write_json
from pipelines.planning.figures import Planning
from pipelines.planning.machine import GIB

_PARTS = 1e-3  # of a sum; less is not worth a digit


def show(plan: Planning) -> None:
    """Print the tables on stderr, like all progress."""
    console = Console(stderr=True)
    for table in tables(plan):
        console.print(table)


def tables(plan: Planning) -> Iterator[Table]:
    """Parameters, memory of each draft, training, corpus and disk."""
    yield _parameters(plan)
    for name in plan.drafts:
        yield _memory(plan, name)
    yield _training(plan)
    yield _corpus(plan)
    yield _disk(plan)


def as_data(plan: Planning) -> dict[str, Any]:
    """Every figure by its name, in bytes, seconds and operations, sums included."""
    data = asdict(plan)
    data["hours"] = plan.hours
    data["disk_parts"] = plan.disk_parts
    data["corpus"]["hours"] = plan.corpus.hours
    for name, draft in plan.drafts.items():
        figures = data["drafts"][name]
        figures["hours"] = draft.hours
        figures["memory"] = {str(stage): parts for stage, parts in figures["memory"].items()}
    return data


def write(plan: Planning, file: Path) -> None:
    """Write `as_data` as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, as_data(plan))


def _parameters(plan: Planning) -> Table:
    table = Table("", "parameters", "trained", "frozen", title="parameters")
    table.add_row("target", f"{plan.target_parameters:,}", "0", f"{plan.target_parameters:,}")
    for name, draft in plan.drafts.items():
        table.add_row(name, f"{draft.parameters:,}", f"{draft.trained:,}", f"{draft.parameters - draft.trained:,}")
    return table


def _memory(plan: Planning, name: str) -> Table:
    memory = plan.drafts[name].memory
    by = "trainer=replicated" if plan.engine == "replicated" else "by ZeRO stage"
    title = f"{name}: GiB of one process of {plan.processes}, {plan.arithmetic}, {by}"
    table = Table("", *(f"{stage} *" if stage == plan.zero_stage else str(stage) for stage in memory), title=title)
    for part in memory[plan.zero_stage]:
        table.add_row(part, *(_gib(parts[part]) for parts in memory.values()))
    sums = [sum(parts.values()) for parts in memory.values()]
    loading = plan.drafts[name].loading
    table.add_row("sum", *map(_gib, sums))
    table.add_row("before, to load", *[_gib(loading)] * len(sums))
    fits = ["fits" if max(total, loading) <= plan.memory else "too much" for total in sums]
    table.add_row(f"of {_gib(plan.memory)}", *fits)
    return table


def _training(plan: Planning) -> Table:
    drafts = plan.drafts.values()
    table = Table("", *plan.drafts, title=f"training on {plan.machine}")
    table.add_row("steps", *(f"{draft.steps:,}" for draft in drafts))
    table.add_row("conversations a step", *(f"{draft.conversations:,}" for draft in drafts))
    table.add_row("positions a step", *(f"{draft.supervised:,}" for draft in drafts))
    table.add_row("FLOPs a step", *(f"{draft.step_flops:.3g}" for draft in drafts))
    table.add_row("FLOPs in all", *(f"{draft.steps * draft.step_flops:.3g}" for draft in drafts))
    table.add_row("seconds a step", *(f"{draft.step_seconds:.3g}" for draft in drafts))
    table.add_row("hours", *(f"{draft.hours:,.2f}" for draft in drafts))
    return table


def _corpus(plan: Planning) -> Table:
    corpus = plan.corpus
    table = Table("", "", title="corpus")
    table.add_row("conversations", f"{corpus.conversations:,}")
    table.add_row("tokens each", f"{corpus.prompt_tokens:,} asked, {corpus.response_tokens:,} written")
    table.add_row("tokens to write", f"{corpus.to_write:,}")
    table.add_row("tokens/s", f"{corpus.tokens_per_s:,.0f} ({corpus.how})")
    table.add_row("hours", f"{corpus.hours:,.2f}")
    return table


def _disk(plan: Planning) -> Table:
    parts = plan.disk_parts
    total = sum(parts.values())
    table = Table("", "GiB", title="disk")
    for part, size in parts.items():
        if size > _PARTS * total or part in ("features", "states", "checkpoints"):
            table.add_row(part, _gib(size))
    table.add_row("sum", _gib(total))
    table.add_row(f"of {_gib(plan.disk)}", "fits" if total <= plan.disk else "too much")
    table.add_row("DeepSpec's cache, to compare", _gib(plan.corpus.reference_cache))
    return table


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:.2f}"
