"""Settings of the stages that measure, choose and publish. What they do with them is in the stages' own modules, apart
from here so that a configuration is composed without torch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inference.graphed.asked import CAPTURED, CAPTURED_AUTO
from inference.statistics import BASELINE
from pipelines.registry import is_name

if TYPE_CHECKING:
    from inference.batch.load import Point

ALL = "all"
"""In place of the names of exports: those that fit the draft."""


def _check_captured(stage: str, asked: str) -> None:
    if asked not in CAPTURED:
        raise ValueError(
            f"{stage}.captured is {asked!r}; choose one of {', '.join(CAPTURED)}, in quotes in a YAML file"
        )


@dataclass(kw_only=True)
class ScoreConfig:
    """What is measured.

    Attributes:
        temperatures: every prompt is decoded at each of these.
        validation_prompts: per domain, used to choose block lengths and to time the arms before scoring.
        calibration_prompts: validation prompts per domain that the draft's chances are calibrated on, where the policy
            goes by them; half are for the fit, half to judge it.
        screen_after: prompts per domain after which an arm that is clearly slow is measured no further; 0 never.
        screen_below: an arm counts as clearly slow when the upper end of its speedup's interval over those prompts is
            below this; its figures stay, from the prompts it has seen.
        price_per_hour: of this machine, in any currency, for the cost per million tokens; 0 leaves it out.
        max_prompt_tokens: longer held-out prompts are left out, in tokens.
        decode_best: candidates that are decoded, those with the best expected speedup by the pre-score and all that
            have none; 0 decodes all of them, and so do that many or fewer candidates, without a pre-score.
        prescore_prompts: validation prompts per domain behind the pre-score.
        captured: decode target-only and feature drafts by captured rounds (docs/gpu.md): `auto` on a CUDA device, where
            the target can be captured; `on` anywhere, on a CPU the same rounds uncaptured; `off` nowhere. They follow
            temperatures alone and propose a fixed number of tokens.
    """

    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    validation_prompts: int = 2
    calibration_prompts: int = 4
    screen_after: int = 1
    screen_below: float = 0.8
    price_per_hour: float = 0.0
    max_prompt_tokens: int = 768
    decode_best: int = 3
    prescore_prompts: int = 3
    captured: str = CAPTURED_AUTO

    def __post_init__(self) -> None:
        if not self.temperatures or any(t < 0 for t in self.temperatures):
            raise ValueError(f"score.temperatures is {self.temperatures}; give at least one, none below 0")
        if self.validation_prompts < 1 or self.screen_after < 0 or self.max_prompt_tokens < 1:
            raise ValueError("score needs validation_prompts >= 1, screen_after >= 0 and max_prompt_tokens >= 1")
        if self.calibration_prompts < 2:
            raise ValueError(
                f"score.calibration_prompts is {self.calibration_prompts}; use at least 2, one to judge by"
            )
        if self.decode_best < 0:
            raise ValueError(
                f"score.decode_best is {self.decode_best}; use 0 to decode every candidate, or how many of the best"
            )
        if self.prescore_prompts < 1:
            raise ValueError(f"score.prescore_prompts is {self.prescore_prompts}; use at least 1")
        _check_captured("score", self.captured)


@dataclass(kw_only=True)
class SelectConfig:
    """Which drafts may win.

    Attributes:
        temperature: decide on the figures at this temperature; None pools all that were scored.
        max_draft_mib: largest memory of the draft, weights and caches, in MiB; 0 for no limit.
        min_alpha: least share of proposed tokens accepted; 0 for no limit.
    """

    temperature: float | None = None
    max_draft_mib: float = 0.0
    min_alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.max_draft_mib < 0 or not 0 <= self.min_alpha <= 1:
            raise ValueError(
                f"select needs max_draft_mib >= 0 and min_alpha in [0, 1], got {self.max_draft_mib}, {self.min_alpha}"
            )


@dataclass(kw_only=True)
class LoadConfig:
    """What load is put on the engine.

    Attributes:
        draft: one of the drafts; empty for the one that the selection chose.
        concurrencies: requests kept running in a closed loop.
        lengths: fixed lengths that the scheduler is compared with, in tokens.
        temperatures: each request gets one of them, drawn by prompt and block; several make a mixed load. Above 0,
            arms write different answers to the same request, so their ratios need more blocks.
        max_new_tokens: longest answer, in tokens.
        max_prompt_tokens: longer held-out prompts are left out, in tokens.
        requests: fewest requests of a block; a closed loop never gets fewer than two for each that is kept running.
        poisson_shares: arrivals a second over what target-only decoding serves in its best closed loop of the first
            block; empty for no Poisson loads.
        poisson_requests: requests of a block of arrivals.
        generate: batch sizes at which transformers' `generate` and the engine's target-only decoding answer the same
            requests; empty for none.
        minutes: how long it may take; a number of blocks follows from it once every load has had its first.
        blocks: of each load; 0 for as many as the minutes allow, two at least.
        captured: all arms but `generate` by captured rounds (docs/gpu.md): `auto` on a CUDA device, where target and
            draft can be captured; `on` anywhere, on a CPU the same rounds uncaptured, and what cannot is refused; `off`
            nowhere. They follow temperatures alone, and the scheduler then proposes equally many tokens for all
            requests of a round.
    """

    draft: str = ""
    concurrencies: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    lengths: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    max_new_tokens: int = 48
    max_prompt_tokens: int = 384
    requests: int = 8
    poisson_shares: list[float] = field(default_factory=lambda: [0.5, 0.9])
    poisson_requests: int = 32
    generate: list[int] = field(default_factory=lambda: [8, 32])
    minutes: float = 60.0
    blocks: int = 0
    captured: str = CAPTURED_AUTO

    def __post_init__(self) -> None:
        if not self.concurrencies or min([*self.concurrencies, *self.generate]) < 1:
            raise ValueError("load.concurrencies and load.generate count requests; give at least one, and none below 1")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"load.lengths is {self.lengths}; give at least one, none below 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"load.temperatures is {self.temperatures}; give at least one, none below 0")
        if any(not share > 0 for share in self.poisson_shares):
            raise ValueError(f"load.poisson_shares is {self.poisson_shares}; use shares above 0, or [] for none")
        counts = ("max_new_tokens", "max_prompt_tokens", "requests", "poisson_requests")
        if wrong := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"load.{wrong[0]} is {getattr(self, wrong[0])}; use at least 1")
        if not self.minutes > 0 or self.blocks < 0:
            raise ValueError("load needs minutes above 0 and blocks of at least 0")
        _check_captured("load", self.captured)

    def points(self) -> "list[Point]":
        """The loads, in the order in which they run: arrivals last, since their rate comes from the closed loops."""
        from inference.batch.load import BATCH, CLOSED, POISSON, Point

        most = max(self.concurrencies)
        closed = [Point(CLOSED, concurrency) for concurrency in dict.fromkeys(self.concurrencies)]
        batches = [Point(BATCH, size) for size in dict.fromkeys(self.generate)]
        return [*closed, *batches, *(Point(POISSON, most, share) for share in dict.fromkeys(self.poisson_shares))]

    def arms(self, point: "Point") -> list[str]:
        """The arms that run at a load."""
        from inference.batch.load import BATCH
        from inference.batch.load_figures import GENERATE, SCHEDULED, fixed_arm

        if point.kind == BATCH:
            return [BASELINE, GENERATE]
        return [BASELINE, *(fixed_arm(length) for length in sorted(set(self.lengths))), SCHEDULED]


@dataclass(kw_only=True)
class PublishConfig:
    """How the pair is published.

    Attributes:
        name: of the pair in the registry.
        check_prompts: prompts decoded again by a fresh process from the published files, at every temperature scored;
            their tokens must be the scored ones.
        exports: formats for serving engines that are written to `serve/`; `all` for those that fit the draft, an empty
            list for none.
    """

    name: str = "smollm2-135m"
    check_prompts: int = 2
    exports: list[str] = field(default_factory=lambda: [ALL])

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError(f"publish.name is {self.name!r}; use letters, digits, dots, dashes, not a version name")
        if self.check_prompts < 1:
            raise ValueError(f"publish.check_prompts is {self.check_prompts}; check at least 1 prompt")
