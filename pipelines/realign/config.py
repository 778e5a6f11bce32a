"""Settings of re-alignment."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class GateConfig:
    """When a challenger replaces the champion.

    Attributes:
        alpha: chance that a challenger that is not faster is ever promoted, however often the gate looks.
        margin: share of its speed that a domain may lose: promotion needs proof of less, per domain and at `alpha`.
        useful: share of speed below which a gain is not worth a new version; a challenger that surely gains less is
            given up early.
        clip: paired log ratios of speed are cut to this size, so that one disturbed request cannot decide.
        min_domain_prompts: domains with fewer held-out prompts are judged together, as `other`.
        max_prompts: most held-out prompts; undecided after them, the champion stays.
    """

    alpha: float = 0.05
    margin: float = 0.1
    useful: float = 0.01
    clip: float = 0.25
    min_domain_prompts: int = 8
    max_prompts: int = 160

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"realign.gate.alpha is {self.alpha}; use a number between 0 and 1")
        if not 0 < self.margin < self.clip or not 0 <= self.useful < self.clip:
            raise ValueError("realign.gate needs 0 < margin < clip and 0 <= useful < clip")
        if self.min_domain_prompts < 1 or self.max_prompts < 1:
            raise ValueError("realign.gate needs min_domain_prompts and max_prompts of at least 1")


@dataclass(kw_only=True)
class RealignConfig:
    """What a re-alignment may spend, and when it starts.

    Attributes:
        force: start without an alarm.
        recent: latest requests of the traffic log that prompts are taken from.
        heldout_share: share of those prompts that only the gate sees.
        responses: answers of the current target that the challenger learns from.
        replay_share: share of them to prompts of the run's own sources, so that nothing is forgotten.
        sequences_per_step: conversations in one of its steps; 0 for as many as the champion's had. Small steps
            go further in little time.
        lr_scale: learning rate of a warm start, as a share of the one the draft was trained with.
        token_share: most training tokens, as a share of those the champion has seen; 0 for no such limit.
        scratch_after: cycles in a row that ended without promotion after which the next starts from new weights.
        fresh: start from new weights in any case.
        cause_prompts: prompts on which the cause is looked for.
        cooldown_hours: least time between two cycles of a pair.
        max_per_day: most cycles of a pair in 24 hours.
        economic: start on an alarm of acceptance only when the seconds it is expected to save over `horizon_days` are
            more than those of retraining.
        horizon_days: see `economic`.
        webhook: URL that decisions are posted to as JSON; empty for none.
        gate: when a challenger replaces the champion.
    """

    force: bool = False
    recent: int = 4000
    heldout_share: float = 0.3
    responses: int = 512
    replay_share: float = 0.5
    sequences_per_step: int = 4
    lr_scale: float = 0.2
    token_share: float = 0.25
    scratch_after: int = 2
    fresh: bool = False
    cause_prompts: int = 12
    cooldown_hours: float = 1.0
    max_per_day: int = 4
    economic: bool = False
    horizon_days: float = 7.0
    webhook: str = ""
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        if not 0 < self.heldout_share < 1 or not 0 <= self.replay_share < 1:
            raise ValueError("realign needs 0 < heldout_share < 1 and 0 <= replay_share < 1")
        if min(self.recent, self.responses, self.scratch_after, self.cause_prompts, self.max_per_day) < 1:
            raise ValueError(
                "realign needs recent, responses, scratch_after, cause_prompts and max_per_day of at least 1"
            )
        if self.sequences_per_step < 0:
            raise ValueError(f"realign.sequences_per_step is {self.sequences_per_step}; use 0 or more")
        if not self.lr_scale > 0 or self.token_share < 0 or self.cooldown_hours < 0 or not self.horizon_days > 0:
            raise ValueError(
                "realign needs lr_scale and horizon_days above 0, token_share and cooldown_hours not below"
            )
