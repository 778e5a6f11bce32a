"""The page for people beside a published pair: what was chosen, what it measured, what to do with it.

Figures are those of the scorecards, and the advice is `pipelines.advice`; nothing is computed here. The front matter
that model hubs read is not made here.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from inference.batch.load_figures import LoadFigure
from inference.pair_files import lookahead_words
from inference.statistics import BASELINE, Scorecard, find_card
from pipelines.advice import Advice, advise, prompts_of
from pipelines.exports.write import README_FILE, SERVE_FOLDER, Export
from pipelines.report import markdown_table, scorecard_rows
from pipelines.select import Decision


def model_card(
    info: Mapping[str, Any],
    decision: Decision,
    cards: Sequence[Scorecard],
    *,
    location: str,
    exports: Sequence[Export] = (),
    load: Sequence[LoadFigure] = (),
) -> str:
    """The page, in Markdown, without front matter.

    Args:
        info: what `pair.json` says.
        decision: who won, and why the others did not.
        cards: of all arms.
        location: folder the version will have, for commands.
        exports: of the draft for serving engines.
        load: figures of many requests at once, where they were measured.
    """
    winner = find_card(cards, decision.winner)
    header, rows = scorecard_rows([card for card in cards if card.arm == decision.winner])
    prompts = prompts_of(cards, arm=BASELINE)
    return (
        f"# {info['name']} {info['version']}: {decision.winner} draft for {info['target']['path']}\n\n"
        f"Chosen because: {decision.reason}. Decoding is lossless: the output is the target's own.\n\n"
        f"Measured on {info['cost_profile']['device']}; tau counts the bonus token; intervals are 95 % bootstraps over "
        f"{prompts} held-out prompts ({winner.requests} requests). Decoding: "
        f"{info['decoding']['precision']}, {lookahead_words(info['decoding']['lookahead'])}.\n\n"
        f"{markdown_table(header, rows)}\n"
        f"## Advice\n\n{_advice(advise(cards, winner=decision.winner, load=load))}\n"
        f"## All candidates\n\n{_candidates(decision)}\n"
        f"## Use\n\n{_use(location)}\n{_exports(exports)}"
        f"{_learned(info)}Every figure can be recomputed from `records.jsonl`; `report.html` shows them all.\n"
    )


def _learned(info: Mapping[str, Any]) -> str:
    """What a draft that was trained has learned from."""
    if not info.get("training"):
        return ""
    return (
        "The draft learned from responses of the target itself; held-out prompts share no ten-word run with its "
        "training prompts. "
    )


def _advice(lines: Sequence[Advice]) -> str:
    return "".join(f"- {line.text} *({line.evidence})*\n" for line in lines)


def _candidates(decision: Decision) -> str:
    return markdown_table(
        ["draft", "speedup", "tau", "may win"],
        [[c.arm, str(c.speedup), f"{c.tau:.2f}", c.refused or "yes"] for c in decision.candidates],
    )


def _use(location: str) -> str:
    """In Python, once, and as a server."""
    where = shlex.quote(location)
    return (
        "```python\nfrom inference.pair import load_pair\n\n"
        f"pair = load_pair({location!r})\n"
        'print(pair.generate("Why is the sky blue?").text)\n```\n\n'
        "```sh\n"
        f'dspark generate --pair {where} "Why is the sky blue?"\n'
        f"dspark serve --pair {where}\n"
        "```\n"
    )


def _exports(exports: Sequence[Export]) -> str:
    """Engines that load the draft, and where their commands are; nothing without any."""
    engines = dict.fromkeys(one.engine for export in exports for one in export.engines if not one.refuses)
    if not engines:
        return ""
    return (
        f"Other engines that load it: {', '.join(engines)}; their commands are in `{SERVE_FOLDER}/{README_FILE}`.\n\n"
    )
