"""What an unchanged draft is worth on a target that changes: tau by domain and temperature, always on the same prompts.

Trains nothing: the targets are made by `pipelines.drift_target`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from distill.chat import messages_for, render_prompt
from distill.prompts import Prompt
from inference.block_length import decode_validation
from inference.drafters import LoadContext, load_drafter
from inference.errors import InputError
from inference.lookahead.fixed import FixedLookahead
from inference.parallel import load_target
from inference.precision import available_precisions
from inference.records import Record, record_of
from inference.sampling_settings import SamplingSettings
from inference.scoring import Arm, ScorePrompt
from inference.statistics import Bootstrap, Estimate, ratio
from inference.target import stop_tokens, target_digest

DOMAIN = "maths"
OTHERS = {"code": "human_eval", "chat": "mt_bench"}
"""Domains that are not trained on, with the set their prompts come from; each gets a third of the domain's number."""
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How far the target drifts, and how the draft is measured on it.

    Attributes:
        steps: optimizer steps.
        checkpoints: steps after which the target is saved and the draft measured.
        rank: of the adapters; their scale is twice the rank over the rank.
        lr: peak learning rate.
        batch: conversations a step.
        seed: of adapters, order, choice of prompts and sampling.
        max_tokens: longer conversations are left out.
        tau_prompts: prompts of the domain that tau is measured on; the other domains get a third of that each.
        answer_tokens: longest answer when tau is measured.
        block: tokens the draft proposes a round.
    """

    steps: int = 200
    checkpoints: tuple[int, ...] = (25, 50, 100, 200)
    rank: int = 16
    lr: float = 1e-3
    batch: int = 8
    seed: int = 0
    max_tokens: int = 512
    tau_prompts: int = 24
    answer_tokens: int = 96
    block: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch", "max_tokens", "tau_prompts", "answer_tokens", "block"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", where="drift", mend="use at least 1")
        if self.seed < 0 or not 0.0 < self.lr < math.inf:
            raise InputError(f"lr is {self.lr}, seed {self.seed}", where="drift", mend="use a rate > 0 and a seed >= 0")
        steps = list(self.checkpoints)
        if not steps or steps != sorted(set(steps)) or not 1 <= steps[0] <= steps[-1] <= self.steps:
            raise InputError(
                f"checkpoints are {steps}", where="drift", mend=f"use rising numbers between 1 and steps ({self.steps})"
            )


@dataclass(frozen=True)
class Tau:
    """What the draft is worth on one domain at one temperature.

    Attributes:
        domain: of the prompts.
        temperature: they were decoded at.
        tau: emitted tokens per target pass.
        change: relative to the unchanged target on the same prompts, -0.2 for a fall by a fifth.
    """

    domain: str
    temperature: float
    tau: Estimate
    change: Estimate


@dataclass(frozen=True)
class Point:
    """The target after some steps.

    Attributes:
        step: optimizer steps made; 0 is the unchanged target.
        digest: of the target (`inference.target.target_digest`).
        train_loss: mean over the steps before this point, in nats a token; None at step 0.
        probe_loss: on reference answers that are not trained on, likewise; None at step 0.
        taus: by domain and temperature.
        answer: what the target answers to the first prompt of the domain at temperature 0.
    """

    step: int
    digest: str
    train_loss: float | None
    probe_loss: float | None
    taus: list[Tau]
    answer: str

    def tau(self, domain: str, temperature: float) -> Tau:
        """One of the measurements."""
        return next(t for t in self.taus if (t.domain, t.temperature) == (domain, temperature))


@dataclass
class DraftProbe:
    """Measures one draft on targets, always on the same prompts.

    Attributes:
        draft: folder of the draft.
        prompts: what is asked.
        settings: length of answers, block and seed.
        device: where it runs.
        base: records of the unchanged target, to compare with.
    """

    draft: Path
    prompts: list[Prompt]
    settings: Settings
    device: torch.device
    base: list[Record] = field(default_factory=list)

    def measure(self, folder: Path, *, step: int, losses: tuple[float, float] | None = None) -> Point:
        """Tau on the target of a folder; the first one measured is what later ones are compared with.

        Args:
            folder: the target.
            step: optimizer steps made.
            losses: of training and of the probe, if anything was trained.
        """
        precision = _decoding_precision(self.device)
        model = load_target(folder, precision=precision, device=self.device)
        drafter = load_drafter(LoadContext(self.draft, folder, model, precision, self.device))
        arm = Arm("draft", model, drafter, FixedLookahead(self.settings.block))
        records, answer = self._decode(arm)
        self.base = self.base or records
        taus = [
            _tau(self.base, records, domain, temperature, seed=self.settings.seed)
            for temperature in TEMPERATURES
            for domain in (DOMAIN, *OTHERS)
        ]
        train_loss, probe_loss = losses or (None, None)
        return Point(step, target_digest(folder), train_loss, probe_loss, taus, answer)

    def _decode(self, arm: Arm) -> tuple[list[Record], str]:
        """Records of every prompt at every temperature, and the text of the first answer."""
        stops, records, answer = stop_tokens(arm.target), [], ""
        tokenizer, limit = arm.target.tokenizer, self.settings.answer_tokens
        for prompt in self.prompts:
            ids = render_prompt(tokenizer, messages_for(prompt.turns, system=prompt.system))
            name = f"{prompt.source}/{prompt.id}"
            asked = ScorePrompt(name, prompt.domain, torch.tensor(ids, device=self.device))
            for temperature in TEMPERATURES:
                sampling = SamplingSettings(temperature=temperature)
                decoded = decode_validation(arm, asked, arm.lookahead, sampling, limit, stops, self.settings.seed)
                answer = answer or str(tokenizer.decode(decoded.tokens, skip_special_tokens=True))
                records.append(
                    record_of(
                        decoded,
                        prompt_id=name,
                        domain=prompt.domain,
                        temperature=temperature,
                        arm=arm.name,
                        order=0,
                        prompt_tokens=len(ids),
                        draft_bytes=arm.drafter.nbytes(),
                        target_bytes=arm.target.nbytes(),
                        mismatch=None,
                    )
                )
        return records, answer


def _tau(base: list[Record], now: list[Record], domain: str, temperature: float, *, seed: int) -> Tau:
    """Tau and its change; resamples draw prompts, and with a prompt its answers before and after together."""
    before, after = ([r for r in side if (r.domain, r.temperature) == (domain, temperature)] for side in (base, now))
    boot = Bootstrap([r.prompt_id for r in after], seed=seed, resamples=2000)
    old, new = (
        ratio(boot.sums(side, lambda r: r.emitted), boot.sums(side, lambda r: r.passes)) for side in (before, after)
    )
    return Tau(domain, temperature, boot.estimate(new), boot.estimate(ratio(new, old) - 1.0))


def _decoding_precision(device: torch.device) -> str:
    """The arithmetic that is fastest for a few rows, by kind of device; no measurement."""
    wanted = ("packed_by_rows", "fp32_packed", "fp32") if device.type == "cpu" else ("bf16",)
    here = available_precisions(device)
    return next(name for name in wanted if name in here)


__all__ = ["DOMAIN", "OTHERS", "TEMPERATURES", "DraftProbe", "Point", "Settings", "Tau"]
