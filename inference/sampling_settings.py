"""How tokens are drawn and how long answers get: settings alone. What they do to logits is `inference.sampling`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is drawn from logits.

    Attributes:
        temperature: 0 is greedy decoding; above 0 divides the logits.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this share; 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already seen; 1 is off
            (Keskar et al. 2019, section 4.1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < 100.0:
            raise ValueError(f"temperature is {self.temperature}; use 0 for greedy decoding or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 0 to keep every token or a positive count")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; use a share in (0, 1], where 1 keeps every token")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; use 1 for none or a positive number")

    @property
    def greedy(self) -> bool:
        """Whether decoding takes the most probable token."""
        return self.temperature == 0.0


@dataclass(kw_only=True)
class DecodeConfig:
    """What a request asks for, apart from its temperature, which the score sets itself.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        top_k: see `SamplingSettings`.
        top_p: see `SamplingSettings`.
        repetition_penalty: see `SamplingSettings`.
    """

    max_new_tokens: int = 128
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; use at least 1")
        self.settings(0.0)

    def settings(self, temperature: float) -> SamplingSettings:
        """Sampling settings at one temperature."""
        return SamplingSettings(
            temperature=temperature, top_k=self.top_k, top_p=self.top_p, repetition_penalty=self.repetition_penalty
        )
