"""What an engine is asked to do, and what came of it; both travel as JSON to engines in environments of their own."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Greedy or sampled answers to prompts, one request at a time.

    Attributes:
        target: folder of the target.
        layout: format of the draft; empty for target-only decoding.
        draft: folder of the export; empty where the engine has the draft itself, or there is none.
        tokens: proposed a round; 0 for target-only decoding.
        prompts: token ids.
        max_tokens: longest answer.
        temperature: 0 is greedy.
        seed: of sampled answers.
        stop_tokens: any of them ends an answer.
        threads: of the processor.
        settings: what a draft without files needs, such as the lengths of a look-up.
    """

    target: str
    layout: str
    draft: str
    tokens: int
    prompts: list[list[int]]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: list[int] = field(default_factory=list)
    threads: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What an engine made of a job.

    Attributes:
        engine: its name and version.
        tokens: answers, as token ids.
        seconds: of each answer, the prompt's pass included.
        rounds: target passes that verified a proposal.
        proposed: draft tokens in them.
        accepted: of those, the ones that stood.
        accepted_at: by position, where the engine tells.
    """

    engine: str
    tokens: list[list[int]]
    seconds: list[float]
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float | None:
        """1 + accepted / rounds that proposed anything (method section 1, as vLLM reports it); None without rounds."""
        return 1.0 + self.accepted / self.rounds if self.rounds else None

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens per second, prefill included."""
        return sum(map(len, self.tokens)) / sum(self.seconds)

    def same_answers(self, other: "Outcome") -> int:
        """How many answers are the other's, token for token."""
        return sum(mine == theirs for mine, theirs in zip(self.tokens, other.tokens, strict=True))


@dataclass(frozen=True)
class Place:
    """Where engines are.

    Attributes:
        python: interpreter of the environment that `make engines` makes.
        llama_cpp: source tree of llama.cpp with its build.
        work: folder for what is made on the way.
    """

    python: Path
    llama_cpp: Path
    work: Path
