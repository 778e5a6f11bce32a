"""The target answers in this process: many conversations at once, sorted by length, drawn from its own distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distill.chat import end_of_turn, follow_up, messages_for, render_prompt
from distill.prompts import Prompt, rank
from distill.responses import check_answers
from distill.responses._context import AnswerContext, sample_of
from inference.sampling_settings import SamplingSettings
from inference.taps import default_taps

if TYPE_CHECKING:
    import torch

    from distill.corpus import Sample
    from inference.answers import Answering
    from inference.batch.responses import Wanted
    from inference.generation import Response


_SHARD_BATCHES = 4
_SHARD_CONVERSATIONS = 256


@dataclass(kw_only=True)
class Config:
    """How the target answers.

    Attributes:
        kind: this generator.
        temperature: 0 is greedy.
        temperatures: above 0, of conversations by turns in place of it, as their ids say; low ones are how greedy
            answers read, high ones how varied ones do.
        top_k: see `inference.sampling_settings.SamplingSettings`.
        top_p: see `inference.sampling_settings.SamplingSettings`.
        max_new_tokens: longest response of one turn, in tokens.
        answers: most answers to one training prompt, where its domain has fewer prompts than responses are wanted.
        batch_size: conversations answered at once; where one has its answer the next begins, within a shard.
        shard_size: conversations of a shard, which is what a killed run writes again; never fewer than `batch_size`. 0
            for four times as many as that, but at most 256.
        keep_states: keep the states that predicted each token, so that training need not run the target again.
        keep_prompt_states: keep them for the prompts' tokens as well, for drafts that learn from prompts.
        keep_features: keep the target's features too, for drafts that read them, unless they need more than
            `features_gib` or half of the free disk.
        taps: layers whose features are kept (decoder indices); empty for five spread from layer 1 to n - 3.
        features_gib: most room for features, in GiB.
        compress_features: keep them as 8-bit numbers with a scale for each layer and token, in about half the room.
    """

    kind: str = "local"
    temperature: float = 0.8
    temperatures: list[float] = field(default_factory=list)
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    answers: int = 1
    batch_size: int = 32
    shard_size: int = 0
    keep_states: bool = True
    keep_prompt_states: bool = True
    keep_features: bool = True
    taps: list[int] = field(default_factory=list)
    features_gib: float = 4.0
    compress_features: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"corpus.max_new_tokens and batch_size must be at least 1, got {self.max_new_tokens}, {self.batch_size}"
            )
        if any(not 0 < temperature < math.inf for temperature in self.temperatures):
            raise ValueError(f"corpus.temperatures is {self.temperatures}; each must be above 0")
        check_answers(self.answers, temperature=max(self.temperatures, default=self.temperature))
        if self.shard_size < 0:
            raise ValueError(f"corpus.shard_size is {self.shard_size}; use 0 or more")
        if not self.features_gib >= 0:
            raise ValueError(f"corpus.features_gib is {self.features_gib}; use 0 or more")
        self.settings()

    def conversations_per_shard(self) -> int:
        """See `shard_size`; some batches each, since answers wait for nobody within a shard, but few enough for their
        states to fit into memory."""
        wanted = self.shard_size or min(_SHARD_BATCHES * self.batch_size, _SHARD_CONVERSATIONS)
        return max(self.batch_size, wanted)

    def settings(self) -> SamplingSettings:
        """Sampling settings of the responses, but for temperatures of their own."""
        temperature = max(self.temperatures, default=self.temperature)
        return SamplingSettings(temperature=temperature, top_k=self.top_k, top_p=self.top_p)

    def tapped_layers(self, num_target_layers: int) -> list[int]:
        """Layers whose features are wanted; none when features are not kept."""
        if not self.keep_features:
            return []
        return list(self.taps) or default_taps(num_target_layers)

    def needs_target(self) -> bool:
        """Whether `answer` runs the target in this process."""
        return True

    def wanted(self, *, stop_tokens: frozenset[int], taps: Sequence[int]) -> "Wanted":
        """What the answers of a turn are to be, and what is kept along with them."""
        from inference.batch.responses import Wanted

        return Wanted(
            settings=self.settings(),
            max_new_tokens=self.max_new_tokens,
            stop_tokens=stop_tokens,
            keep_states=self.keep_states,
            keep_prompt_states=self.keep_states and self.keep_prompt_states,
            taps=tuple(taps),
        )

    def answering(self, context: AnswerContext) -> "Answering":
        """The target, ready for shard after shard."""
        from inference.answers import Answering

        assert context.model is not None, "the local generator runs the target"
        wanted = self.wanted(stop_tokens=context.stop_tokens, taps=context.taps)
        return Answering(context.model, wanted, max_running=self.batch_size)

    def prepare(self, prompts: Sequence[Prompt], context: AnswerContext) -> None:
        """Make ready for all shards to come, by the longest first turn of these prompts."""
        first = [messages_for(prompt.turns[:1], system=prompt.system) for prompt in prompts]
        longest = max(len(render_prompt(context.tokenizer, messages)) for messages in first)
        context.answering(self.answering).prepare(longest_prompt=longest)

    def answer(self, prompts: list[Prompt], *, splits: list[str], context: AnswerContext, seed: int) -> "list[Sample]":
        """Answer a batch of prompts turn by turn, keeping the very ids the target wrote.

        Args:
            prompts: one shard.
            splits: split of each prompt.
            context: the target among it.
            seed: fixes every draw of this shard.
        """
        answering = context.answering(self.answering)
        threads = [_Thread(prompt, context) for prompt in prompts]
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            waiting = [thread for thread in threads if thread.open_turn(turn)]
            if not waiting:
                continue
            responses = answering.answer(
                [thread.ids for thread in waiting],
                seed=seed + turn,
                temperatures=[self._temperature(thread.prompt) for thread in waiting] if self.temperatures else (),
            )
            for thread, response in zip(waiting, responses, strict=True):
                thread.add(response)
        return [thread.sample(split) for thread, split in zip(threads, splits, strict=True)]

    def _temperature(self, prompt: Prompt) -> float:
        """Of a conversation; its id alone decides, so that it stays the same whoever answers along with it."""
        place = int.from_bytes(rank(f"temperature of {prompt.id}", seed=0)[:8], "big")
        return self.temperatures[place % len(self.temperatures)]


class _Thread:
    """One conversation while it is being answered: ids, which of them are the target's, and their states."""

    def __init__(self, prompt: Prompt, context: AnswerContext) -> None:
        self.prompt, self.context = prompt, context
        self.messages = messages_for(prompt.turns, system=prompt.system)
        self.ids = render_prompt(context.tokenizer, self.messages)
        self.mask = [False] * len(self.ids)
        self.states: list[torch.Tensor] = []
        self.features: torch.Tensor | None = None
        self.last: list[int] = []

    def open_turn(self, turn: int) -> bool:
        """Put the user's next words in; false when there are none."""
        if turn >= len(self.prompt.turns):
            return False
        if turn > 0:
            self._drop_foreign_stop()
            user = self.prompt.turns[turn]
            bridge = follow_up(self.context.tokenizer, self.messages, response_ids=self.last, user=user)
            self.messages = [*self.messages, {"role": "user", "content": user}]
            self.ids += bridge
            self.mask += [False] * len(bridge)
        return True

    def _drop_foreign_stop(self) -> None:
        """Take back a stop token that this template does not write: no later turn was ever preceded by it."""
        if self.last and self.last[-1] in self.context.stop_tokens:
            if self.last[-1] != end_of_turn(self.context.tokenizer):
                del self.last[-1], self.ids[-1], self.mask[-1]
                self.states = [*self.states[:-1], self.states[-1][:-1]] if self.states else []

    def add(self, response: "Response") -> None:
        """Append the target's answer."""
        self.last = response.tokens
        self.ids += response.tokens
        self.mask += [True] * len(response.tokens)
        if response.states is not None and response.prompt_states is not None:
            # A later turn feeds the whole conversation again, so what it gives replaces the turns before.
            self.states = [response.prompt_states, response.states]
        elif response.states is not None:
            self.states.append(response.states)
        if response.features is not None:
            self.features = response.features
        text = str(self.context.tokenizer.decode(response.tokens, skip_special_tokens=True))
        self.messages = [*self.messages, {"role": "assistant", "content": text}]

    def sample(self, split: str) -> "Sample":
        """The finished conversation."""
        import torch

        return sample_of(
            self.prompt,
            split=split,
            ids=self.ids,
            mask=self.mask,
            states=torch.cat(self.states) if self.states else None,
            features=self.features,
            text=self.messages[-1]["content"],
        )
