"""Answers requests by replaying captured rounds: the host looks once a round, at what was emitted."""

from collections.abc import Callable

import torch

from inference.decoder import Clock, check_prompt_length, up_to_stop
from inference.drafters._token import plain
from inference.graphed.rounds import Rounds
from inference.request import Decoded, Request


class GraphedDecoder:
    """Decodes one request after another; the law and, greedy, the tokens are those of `inference.decoder.decode` with a
    fixed block.

    Parts of a round are not told apart: its seconds are `verify`'s.

    Args:
        rounds: of one request.
    """

    def __init__(self, rounds: Rounds) -> None:
        if rounds.batch != 1:
            raise ValueError(f"rounds of {rounds.batch} requests decode no single one")
        self.rounds = rounds
        device = rounds.anchors.device
        self._host = torch.zeros(rounds.emitted.shape[1], dtype=torch.long, pin_memory=device.type == "cuda")

    @torch.inference_mode()
    def decode(
        self,
        prompt: torch.Tensor,
        *,
        request: Request,
        seed: int,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Decoded:
        """Decode one request losslessly.

        Args:
            prompt: int64 `[T]`, at least one token.
            request: temperature alone of its sampling settings, length and stop rules.
            seed: fixes every random decision.
            on_tokens: called with newly emitted tokens after every round.

        Raises:
            InputError: the prompt is empty or leaves no room.
            ValueError: settings that these rounds do not follow.
        """
        rounds, settings = self.rounds, request.settings
        if not plain(settings):
            raise ValueError("captured rounds know temperatures alone")
        limit = min(rounds.target.target.context_limit, rounds.capacity - rounds.block)
        check_prompt_length(prompt.shape[0], limit)
        budget = min(request.max_new_tokens, limit - prompt.shape[0])
        result = Decoded()
        clock = Clock(result.seconds, prompt.device)
        generator = torch.Generator().manual_seed(seed)
        with clock.part("prefill"):
            rounds.begin(0, prompt)
        if not settings.greedy:
            rounds.temperatures.fill_(settings.temperature)
        length, finished = prompt.shape[0] - 1, False
        start = clock.now()
        while not finished:
            if not settings.greedy:
                uniforms = torch.rand(rounds.uniforms.shape, dtype=torch.float64, generator=generator)
                rounds.uniforms.copy_(uniforms, non_blocking=True)
            rounds.round(shown=rounds.shown(length), sampled=not settings.greedy)
            self._host.copy_(rounds.emitted[0], non_blocking=True)
            if prompt.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            numbers = self._host.tolist()
            count = numbers[-1]
            length += count
            result.count_chain(rounds.block, count - 1)
            emitted, finished = up_to_stop(numbers[: min(count, budget - len(result.tokens))], request.stop_tokens)
            result.tokens += emitted
            finished = finished or len(result.tokens) >= budget
            if on_tokens is not None:
                on_tokens(emitted)
        result.seconds["verify"] = clock.now() - start
        result.cache_nbytes = rounds.target.nbytes()
        return result
