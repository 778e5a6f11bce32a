"""Target-only generation in a padded batch, of any family: left-padded prompts behind what all of them begin with, one
cache, finished rows leave the batch. `inference.batch.responses` does the same for corpora without padding, where
requests of a model can share a pass.

Not speculative and not the baseline of any comparison. Along with the tokens it can keep the state that entered the
output head for each of them, which is all that distillation needs of the target later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from inference.cache import RollbackCache
from inference.decoder import check_prompt_length
from inference.model import CausalModel
from inference.randomness import draw
from inference.sampling import process_logits
from inference.sampling_settings import SamplingSettings

_COMPACT_BELOW = 0.75
# What prompts have in common is read once for all of them from so many tokens on.
_FEWEST_SHARED = 8


@dataclass
class Response:
    """One generated answer.

    Attributes:
        tokens: token ids, the stop token included when one was reached.
        states: `[len(tokens), D]`, the head's input that predicted each token; None unless asked for.
        prompt_states: `[len(prompt) - 1, D]`, the same for the prompt from its second token on; None unless asked for.
        stopped: whether a stop token ended it.
        features: `[len(prompt) + len(tokens), m * D]` in bf16 on the CPU, the tapped layers at every position; zeros
            for the last token, which was never fed. None unless asked for.
    """

    tokens: list[int] = field(default_factory=list)
    states: torch.Tensor | None = None
    stopped: bool = False
    prompt_states: torch.Tensor | None = None
    features: torch.Tensor | None = None


@torch.inference_mode()
def generate_batch(
    model: CausalModel,
    prompts: list[list[int]],
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
    temperatures: Sequence[float] = (),
    keep_states: bool = False,
    keep_prompt_states: bool = False,
    taps: Sequence[int] = (),
) -> list[Response]:
    """Answer a batch of prompts with the model itself.

    Args:
        model: the target.
        prompts: token ids of each prompt, no padding.
        settings: sampling; a repetition penalty is not supported here.
        max_new_tokens: longest answer; a row also ends where its own prompt leaves no more room in the context.
        stop_tokens: each ends a row.
        seed: fixes every draw of this batch.
        temperatures: of each prompt, above 0; none for that of `settings`.
        keep_states: whether to return the head's inputs for the tokens written.
        keep_prompt_states: whether to return them for the prompts' tokens too.
        taps: decoder layers whose outputs are returned as features.

    Raises:
        ValueError: a repetition penalty was asked for.
        InputError: a prompt is empty or does not fit the context.
    """
    if settings.repetition_penalty != 1.0:
        raise ValueError("batched generation has no repetition penalty; set repetition_penalty=1")
    for prompt in prompts:
        check_prompt_length(len(prompt), model.context_limit)
    budgets = [min(max_new_tokens, model.context_limit - len(prompt)) for prompt in prompts]
    steps = max(budgets)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    # A window counts the padding that lies between what is shared and the rest.
    shared = 0 if _has_windows(model) else shared_tokens(prompts)
    ids, mask = left_padded([prompt[shared:] for prompt in prompts], device=model.device)
    longest = shared + ids.shape[1]
    # What all prompts begin with comes first; one column per step, so that a pass extends the mask without copying it.
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask, mask.new_ones(len(prompts), steps)], dim=1)
    responses = [Response() for _ in prompts]
    kept: list[list[torch.Tensor]] = [[] for _ in prompts]
    tapped: list[list[torch.Tensor]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    cache = model.new_cache()
    prompt_states: list[torch.Tensor] = []
    with model.captured_states() as states, model.tapped(taps) as features:
        before: torch.Tensor | None = None
        if shared:
            _read_for_all(model, prompts[0][:shared], cache, count=len(prompts))
            before = states.pop()[0]
            if taps:
                rows_of = features.take()[0].to(torch.bfloat16).cpu()
                for pieces in tapped:
                    pieces.append(rows_of)
        for step in range(steps):
            width = longest + step
            # Ballast rows may run past the context; where they look does not matter, only that it exists.
            positions = (mask[:, :width].cumsum(1) - 1).clamp(0, model.context_limit - 1)[:, -ids.shape[1] :]
            logits = model.model(
                input_ids=ids,
                attention_mask=mask[:, :width],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            own = [temperatures[row] for row in rows] if temperatures else ()
            tokens = draw_tokens(logits, settings, generator, temperatures=own)
            for index, token in enumerate(tokens.tolist()):
                response = responses[rows[index]]
                response.tokens.append(token)
                response.stopped = response.stopped or token in stop_tokens
                if keep_states:
                    kept[rows[index]].append(states[-1][index, -1])
            if keep_prompt_states and not step:
                # What predicted a prompt's tokens; the last row predicted the answer's first.
                prompt_states = [
                    _joined(before, states[-1][index, longest - len(prompt) : -1])
                    for index, prompt in enumerate(prompts)
                ]
            states.clear()
            if taps:
                rows_of = features.take().to(torch.bfloat16).cpu()
                for index, row in enumerate(rows):
                    # The first pass feeds the prompts, padded on the left.
                    tapped[row].append(rows_of[index] if step else rows_of[index, longest - len(prompts[row]) :])
            alive = [i for i, row in enumerate(rows) if not responses[row].stopped and step + 1 < budgets[row]]
            if not alive:
                break
            ids = tokens[:, None]
            # Ended rows go on as ballast until a quarter of the batch is ballast, because compaction copies the cache.
            if len(alive) < _COMPACT_BELOW * len(rows):
                index_of = torch.tensor(alive, device=model.device)
                ids, mask, rows = ids[index_of], mask[index_of], [rows[i] for i in alive]
                cache.batch_select_indices(index_of)
    finished = [
        _finished(response, states_of, stop_tokens, budget=budget)
        for response, states_of, budget in zip(responses, kept, budgets, strict=True)
    ]
    for response, rows_before in zip(finished, prompt_states, strict=False):
        response.prompt_states = rows_before
    for response, prompt, pieces in zip(finished, prompts, tapped, strict=True):
        if pieces:
            fed = len(prompt) + len(response.tokens) - 1
            response.features = torch.cat([*pieces, pieces[0].new_zeros(1, pieces[0].shape[1])])[: fed + 1]
            response.features[fed:] = 0
    return finished


def _finished(response: Response, states: list[torch.Tensor], stop_tokens: frozenset[int], *, budget: int) -> Response:
    """Cut what a row wrote after its own end while it waited for the batch to shrink."""
    tokens = response.tokens[:budget]
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    stopped = end > 0 and tokens[end - 1] in stop_tokens
    return Response(tokens[:end], torch.stack(states[:end]) if states else None, stopped)


def draw_tokens(
    logits: torch.Tensor, settings: SamplingSettings, generator: torch.Generator, *, temperatures: Sequence[float] = ()
) -> torch.Tensor:
    """One token per row, int64 `[batch]`, from logits `[batch, V]`; by temperatures of the rows' own where given."""
    if temperatures:
        logits = logits / torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None]
        settings = replace(settings, temperature=1.0)
    none = torch.empty(0, dtype=torch.long, device=logits.device)
    processed = process_logits(logits, context=none, block=none, settings=settings)
    if settings.greedy:
        return processed.argmax(-1)
    return draw(torch.softmax(processed, dim=-1), generator=generator)


def shared_tokens(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, the last of any left out; 0 where sharing them is not worth a pass."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    count = next((i for i in range(shortest) if any(prompt[i] != first[i] for prompt in prompts)), max(0, shortest))
    return count if len(prompts) > 1 and count >= _FEWEST_SHARED else 0


def _has_windows(model: CausalModel) -> bool:
    """Whether a layer may see the latest positions alone."""
    text = model.model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ()
    return bool(getattr(text, "sliding_window", None)) or any(kind != "full_attention" for kind in kinds)


def _read_for_all(model: CausalModel, tokens: list[int], cache: RollbackCache, *, count: int) -> None:
    """Feed tokens once and let the cache hold them for `count` requests."""
    model.model(
        input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    cache.batch_select_indices(torch.zeros(count, dtype=torch.long, device=model.device))


def _joined(before: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """States of what all prompts begin with, and of the rest of one."""
    return states.clone() if before is None else torch.cat([before, states])


def left_padded(
    prompts: Sequence[Sequence[int]], *, device: torch.device, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 `[batch, longest]`; padding is on the left, so all rows end together."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
