"""The target answers lists of prompts, by whatever suits its device: captured rounds on a GPU, else slots without
padding (`inference.batch.responses`), or padded batches for families whose requests cannot share a pass.
"""

import logging
from collections.abc import Sequence

import torch

from inference.batch.responses import Wanted, answer_all
from inference.errors import InputError
from inference.feature_networks._layers import DraftShape
from inference.generation import Response
from inference.graphed.responses import CapturedAnswers
from inference.memory import return_memory
from inference.model import CausalModel

_LOG = logging.getLogger(__name__)

# Places of captured rounds are as long as the longest request of a list, in steps of so many positions.
_STEP = 256
# Of what is free on a GPU, what places may take.
_SHARE = 0.7


class Answering:
    """One target that answers list after list of prompts; what is captured serves all of them.

    Args:
        model: the target.
        wanted: of every answer.
        max_running: most answers at once.
        captured: whether by captured rounds; None for on a GPU alone.
    """

    def __init__(self, model: CausalModel, wanted: Wanted, *, max_running: int, captured: bool | None = None) -> None:
        self._model, self._wanted, self._max_running = model, wanted, max_running
        # Passes of a target that lies in several processes are announced, which a replayed graph would not be.
        able = type(model) is CausalModel and wanted.settings.repetition_penalty == 1.0
        self._capture = able and (model.device.type == "cuda" if captured is None else captured)
        self._answers: CapturedAnswers | None = None
        self._longest = 0

    def prepare(self, *, longest_prompt: int) -> None:
        """Capture what prompts of so many tokens and their answers need, so that nothing is captured among them."""
        if self._capture:
            try:
                answers = self._captured(self._tokens(longest_prompt))
            except InputError:
                return  # `answer` says why
            answers.prepare(longest_prompt=longest_prompt)

    def answer(self, prompts: list[list[int]], *, seed: int, temperatures: Sequence[float] = ()) -> list[Response]:
        """One response for each prompt, states and features on the CPU.

        Args:
            prompts: token ids of each.
            seed: fixes every draw.
            temperatures: of each prompt, above 0; none for that of all answers.

        Raises:
            ValueError: a repetition penalty was asked for.
            InputError: a prompt is empty or does not fit the context.
        """
        wanted, model = self._wanted, self._model
        if prompts and self._capture:
            try:
                answers = self._captured(self._tokens(max(map(len, prompts))))
            except InputError as error:
                _LOG.info("answers are not made by captured rounds: %s", error)
                self._capture = False
            else:
                return answers.answer(
                    prompts,
                    max_new_tokens=wanted.max_new_tokens,
                    stop_tokens=wanted.stop_tokens,
                    seed=seed,
                    temperatures=temperatures,
                )
        responses = answer_all(
            model, prompts, wanted, max_running=self._max_running, seed=seed, temperatures=temperatures
        )
        for response in responses:
            response.states = _on_cpu(response.states)
            response.prompt_states = _on_cpu(response.prompt_states)
        return responses

    def _tokens(self, prompt: int) -> int:
        """Of a request with such a prompt at most."""
        return min(prompt + self._wanted.max_new_tokens, self._model.context_limit)

    def _captured(self, longest: int) -> CapturedAnswers:
        """Rounds with places for requests of so many tokens; larger ones take the place of smaller ones."""
        if self._answers is None or longest > self._longest:
            self._answers = None
            return_memory()
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
            self._longest = min(-(-longest // _STEP) * _STEP, self._model.context_limit)
            wanted = self._wanted
            self._answers = CapturedAnswers(
                self._model,
                longest=self._longest,
                settings=wanted.settings,
                max_requests=self._room(self._longest),
                keep_states=wanted.keep_states,
                keep_prompt_states=wanted.keep_prompt_states,
                taps=wanted.taps,
            )
        return self._answers

    def _room(self, longest: int) -> int:
        """How many places fit on the device, at most `max_running`: halves of it, so that few sizes are captured."""
        if self._model.device.type != "cuda":
            return self._max_running
        shape = DraftShape.of(self._model.model.config)
        kept = shape.hidden * (len(self._wanted.taps) + 1)
        cached = 2 * shape.target_layers * shape.kv_heads * shape.head_dim
        of_token = self._model.model.dtype.itemsize * (cached + kept)
        free, _ = torch.cuda.mem_get_info(self._model.device)
        room = self._max_running
        while room > 1 and room * longest * of_token > _SHARE * free:
            room //= 2
        return room


def _on_cpu(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None else states.cpu()
