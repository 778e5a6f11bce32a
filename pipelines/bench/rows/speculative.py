"""Speculative decoding with one independent draft, ours against transformers' assisted generation.

The same draft folder, the same prompts, always as many proposed tokens, one request at a time, greedy and at
temperature 1. Without `--draft` the draft is the target without some of its middle layers, untrained: it says something
sensible, costs most of a pass, and so shows the two loops and their passes rather than the draft.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distill.drafts import save_model
from inference.drafters import LoadContext, load_drafter
from inference.drafters.model import ModelDrafter
from inference.errors import InputError
from inference.loading import load_causal_model
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.pair_files import read_draft_spec
from inference.scoring import ScorePrompt
from inference.statistics import Estimate
from inference.target import config_shape, stop_tokens
from pipelines.bench.bench import Bench
from pipelines.bench.decoding import OURS, THEIRS, THEIRS_ON_OURS, Arms, answers_figure, plain_precision
from pipelines.bench.outcome import Figure, Goal, Outcome
from pipelines.bench.paired import Sample, interleaved, speed_ratio
from pipelines.bench.plain import Plain, chosen_note, fastest

GOAL = Goal(1.5)


@dataclass(kw_only=True)
class Config:
    """How much is drafted.

    Attributes:
        kind: this row.
        tokens: proposed a round.
        drop: middle layers that the draft made here does without.
        temperatures: 0 is greedy.
        exact_prompts: greedy answers in fp32 that must be the same token for token, not timed.
    """

    kind: str = "speculative"
    tokens: int = 4
    drop: int = 6
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    exact_prompts: int = 2

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.drop < 0 or self.exact_prompts < 0:
            raise ValueError("speculative needs tokens >= 1, drop >= 0 and exact_prompts >= 0")

    def run(self, bench: Bench) -> Outcome:
        """Measure."""
        prompts = bench.prompts()
        with _draft(bench, self.drop) as (folder, made):
            target = bench.target(bench.block_precision)
            drafter = _drafter(folder, target, bench)
            stops, first = stop_tokens(target), Arms(bench, 0.0)
            plain, found = fastest(
                lambda dtype: Plain.load(bench.target_folder, dtype, device=bench.device, draft=folder),
                lambda model: int(first.theirs(THEIRS, model, stops, num_draft_tokens=self.tokens)(prompts[0])),
                clock=bench.clock,
            )
            notes = [made, f"ours runs in {target.precision}", chosen_note(found, plain.name)]
            models = {THEIRS: plain}
            own = Plain.of(target, drafter.model)
            if refusal := _refusal(own, prompts[0], stops, self.tokens):
                notes.append(f"transformers cannot assist with our model: {refusal}")
            else:
                models[THEIRS_ON_OURS] = own
            figures: list[Figure] = []
            samples: list[Sample] = []
            for temperature in self.temperatures:
                more = self._decoded(bench, temperature, prompts, target, drafter, models)
                figures, samples = [*figures, *more[0]], [*samples, *more[1]]
            if self.exact_prompts:
                figures.append(self._exact(bench, prompts[: self.exact_prompts], folder))
        return Outcome(figures, samples, notes)

    def _decoded(
        self,
        bench: Bench,
        temperature: float,
        prompts: list[ScorePrompt],
        target: CausalModel,
        drafter: ModelDrafter,
        models: dict[str, Plain],
    ) -> tuple[list[Figure], list[Sample]]:
        """All arms at one temperature."""
        arms, stops = Arms(bench, temperature), stop_tokens(target)
        label = f"T={temperature:g}"
        runs = {name: arms.theirs(name, model, stops, num_draft_tokens=self.tokens) for name, model in models.items()}
        samples = interleaved(
            {prompt.id: prompt for prompt in prompts},
            {OURS: arms.ours(target, drafter, FixedLookahead(self.tokens)), **runs},
            title=f"{self.kind}, {label}",
            unit="prompts",
            seed=bench.options.seed,
            clock=bench.clock,
        )
        figures = []
        for name, model in models.items():
            against = f"{name} ({model.name})"
            figures.append(
                Figure(
                    f"{label}: tokens/s over {against}",
                    speed_ratio(samples, OURS, name),
                    goal=GOAL if name == THEIRS else None,
                    detail=arms.detail(samples, OURS, name),
                )
            )
            if temperature == 0:
                counts = arms.differences(prompts, name, target, plain_precision(model, target))
                figures.append(answers_figure(f"{label}: answers unlike those of {against}", counts))
        named = [Sample(f"{label}/{s.unit}", s.arm, s.order, s.amount, s.seconds) for s in samples]
        return figures, named

    def _exact(self, bench: Bench, prompts: list[ScorePrompt], folder: Path) -> Figure:
        """Greedy answers of both in fp32, where there is next to nothing to round."""
        target = bench.target("fp32")
        drafter, arms, stops = _drafter(folder, target, bench), Arms(bench, 0.0), stop_tokens(target)
        plain = Plain.load(bench.target_folder, "fp32", device=bench.device, draft=folder)
        ours = arms.ours(target, drafter, FixedLookahead(self.tokens))
        theirs = arms.theirs(THEIRS, plain, stops, num_draft_tokens=self.tokens)
        for prompt in prompts:
            ours(prompt)
            theirs(prompt)
        counts = arms.differences(prompts, THEIRS, target, "fp32")
        differ = float(len(prompts) - counts["same"])
        goal = Goal(0, at_least=False)
        return Figure(
            "T=0: answers unlike those of transformers, both in fp32", Estimate(differ, None, None), "", goal, counts
        )


def _drafter(folder: Path, target: CausalModel, bench: Bench) -> ModelDrafter:
    drafter = load_drafter(LoadContext(folder, bench.target_folder, target, target.precision, target.device))
    assert isinstance(drafter, ModelDrafter), "the kind was looked at"
    return drafter


def _refusal(plain: Plain, prompt: ScorePrompt, stops: frozenset[int], tokens: int) -> str:
    """Why transformers cannot assist with these models; empty where it can."""
    try:
        plain.generate(
            [prompt.tokens.tolist()],
            temperature=0.0,
            max_new_tokens=2 * tokens,
            stop_tokens=stops,
            seed=0,
            num_draft_tokens=tokens,
        )
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


@contextmanager
def _draft(bench: Bench, drop: int) -> Iterator[tuple[Path, str]]:
    """The folder of the draft and a sentence on it, made for the length of the block where none is given.

    Raises:
        InputError: the given draft is no language model of its own, or the target has too few layers.
    """
    given = bench.options.draft
    if given is not None:
        if (kind := read_draft_spec(given)["kind"]) != "model":
            mend = "name the folder of a pruned or pretrained draft"
            raise InputError(f"transformers assists by language models, not by {kind!r}", where=str(given), mend=mend)
        yield given, f"the draft is {given.name}"
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "draft"
        kept = write_cut_draft(bench.target_folder, folder, drop=drop)
        yield folder, f"the draft is the target's layers {', '.join(map(str, kept))}, untrained"


def write_cut_draft(target: Path, folder: Path, *, drop: int) -> list[int]:
    """Write a draft that is a target without its middle layers; returns those it keeps.

    Raises:
        InputError: no layer would be left.
    """
    count = int(str(config_shape(target)["num_hidden_layers"]))
    if drop >= count:
        mend = f"use at most {count - 1}"
        raise InputError(f"cannot drop {drop} of {count} layers", where="speculative.drop", mend=mend)
    start = (count - drop) // 2
    kept = [*range(start), *range(start + drop, count)]
    cut = load_causal_model(target, precision="bf16", device=torch.device("cpu"), kept_layers=kept)
    save_model(cut, folder, tokenizer_from=target)
    return kept
