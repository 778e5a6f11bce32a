"""A pass over many requests gives each of them the logits it has alone, whatever the others are and do."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import chunked_causal_mask_function

from inference.attention import GROUPED, use_grouped_attention
from inference.batch import SlotCache, ragged_logits
from inference.batch import ragged as ragged_module
from inference.batch.cache import SlotLayer
from inference.cache import RollbackCache
from inference.errors import InputError
from inference.model import CausalModel
from tests.inference.families import CONTEXT, VOCAB, family_model

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox", "phi", "gpt2", "granite", "cohere")


def target(name: str, **changes: Any) -> CausalModel:
    model = family_model(name, **changes)
    model.model.set_attn_implementation("sdpa")
    use_grouped_attention(model.model)
    return model


def some_tokens(count: int, rng: random.Random) -> Tensor:
    return torch.tensor([rng.randrange(VOCAB) for _ in range(count)], dtype=torch.long)


class Crowd:
    """The same requests twice: in the slots of one cache, and each alone in a cache of its own."""

    def __init__(self, model: CausalModel, *, max_slots: int = 8, seed: int = 0) -> None:
        self.model, self.rng = model, random.Random(seed)
        self.cache = SlotCache.for_config(model.model.config, max_slots=max_slots)
        self.alone: list[RollbackCache] = []

    def join(self, prompt: int = 0) -> int:
        """A new request; with a prompt, its prefill, while the others wait."""
        slot = self.cache.join()
        self.alone.append(self.model.new_cache())
        if prompt:
            self.step([prompt], active=[slot])
        return slot

    def leave(self, slot: int) -> None:
        self.cache.leave(slot)
        last = self.alone.pop()
        if slot < len(self.alone):
            self.alone[slot] = last

    @torch.inference_mode()
    def step(
        self,
        widths: Sequence[int],
        *,
        slots: Sequence[Sequence[int]] = (),
        active: Sequence[int] | None = None,
        blocks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """One pass, checked against each request's own."""
        blocks = blocks or [some_tokens(width, self.rng) for width in widths]
        together = ragged_logits(self.model, torch.cat([*blocks]), widths, self.cache, slots=slots, active=active)
        taking = range(len(widths)) if active is None else active
        beside = slots or [()] * len(widths)
        apart = torch.cat(
            [
                self.model.logits(block, self.alone[slot], num_rows=len(block), slots=siblings)
                for block, slot, siblings in zip(blocks, taking, beside, strict=True)
            ]
        )
        self.check(together, apart)
        assert self.cache.lengths == [cache.length for cache in self.alone]
        return together

    def check(self, together: Tensor, apart: Tensor) -> None:
        if together.dtype == torch.float64:
            torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(together.argmax(-1), apart.argmax(-1))

    @torch.inference_mode()
    def keep(self, kept: Sequence[int], moves: Sequence[tuple[int, int, int]] = ()) -> None:
        """Accept siblings, as (slot, source, destination), and roll back to these lengths."""
        if moves:
            self.cache.move(*zip(*moves, strict=True))
        for slot, source, destination in moves:
            self.alone[slot].move(source, destination)
        self.cache.rollback(kept)
        for cache, length in zip(self.alone, kept, strict=True):
            cache.rollback(length)

    def play(self, rounds: int, *, most: int) -> None:
        """Rounds of different widths with siblings, ragged rollbacks, joins and leaves."""
        rng = self.rng
        for _ in range(rounds):
            tight = [slot for slot, cache in enumerate(self.alone) if cache.length > CONTEXT - 16]
            for slot in reversed(tight):
                self.leave(slot)
            if len(self.alone) > 1 and rng.random() < 0.3:
                self.leave(rng.randrange(len(self.alone)))
            while len(self.alone) < most and (not self.alone or rng.random() < 0.6):
                self.join(rng.randrange(1, 40))
            before, moves, kept = self.cache.lengths, [], []
            chains = [rng.choice((0, 0, 1, 3, 5)) for _ in before]
            beside = [sorted(rng.randrange(c) for _ in range(rng.choice((0, 1, 3)) if c else 0)) for c in chains]
            self.step([1 + c + len(b) for c, b in zip(chains, beside, strict=True)], slots=beside)
            for slot, (length, chain, siblings) in enumerate(zip(before, chains, beside, strict=True)):
                if siblings and rng.random() < 0.5:
                    chosen = rng.randrange(len(siblings))
                    kept.append(length + 2 + siblings[chosen])
                    moves.append((slot, length + 1 + chain + chosen, kept[-1] - 1))
                else:
                    kept.append(length + 1 + rng.randint(0, chain))
            self.keep(kept, moves)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_request_has_the_logits_it_has_alone(name: str, most: int) -> None:
    Crowd(target(name), seed=most).play(12, most=most)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_in_single_precision_the_argmax_is_the_same(name: str) -> None:
    model = target(name)
    model.model.float()
    Crowd(model).play(12, most=5)


def test_any_list_of_slots_may_take_part_while_others_wait() -> None:
    crowd = Crowd(target("gemma3_text"))
    for prompt in (20, 5, 12, 9):
        crowd.join(prompt)
    crowd.join()
    for active in ([3, 0], [1, 2], [4], [2, 4, 1], [0, 1, 2, 3, 4]):
        crowd.step([crowd.rng.randrange(1, 6) for _ in active], active=active)


def test_prefill_and_decoding_may_share_a_pass() -> None:
    crowd = Crowd(target("qwen3"))
    crowd.join(30)
    crowd.join(3)
    crowd.join()
    crowd.step([1, 3, 25], slots=[(), (0,), ()])


def test_wanted_rows_are_those_of_all() -> None:
    model, rng = target("llama"), random.Random(0)
    tokens = some_tokens(9, rng)
    for wanted in ([8, 0, 4], [], [3]):
        rows = []
        for chosen in (torch.tensor(wanted, dtype=torch.long), None):
            cache = SlotCache.for_config(model.model.config, max_slots=2)
            cache.join(), cache.join()
            rows.append(ragged_logits(model, tokens, [4, 5], cache, rows=chosen))
        torch.testing.assert_close(rows[0], rows[1][wanted], rtol=1e-12, atol=1e-12)
        assert rows[0].shape == (len(wanted), VOCAB)


def test_linear_layers_see_the_tokens_there_are_and_no_padding() -> None:
    model = target("llama")
    crowd, seen = Crowd(model), []
    for prompt in (7, 2):
        crowd.join(prompt)
    handle = model.model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    ragged_logits(model, some_tokens(6, crowd.rng), [1, 5], crowd.cache)
    handle.remove()
    assert seen == [(1, 6, 32)]


@torch.inference_mode()
def test_tapped_features_come_in_flat_order() -> None:
    model = target("qwen2")
    crowd = Crowd(model)
    for prompt in (11, 4, 6):
        crowd.join(prompt)
    widths, slots = [2, 5, 1], [(), (0, 1), ()]
    blocks = [some_tokens(width, crowd.rng) for width in widths]
    taps = [-1, 1, 0]
    with model.tapped(taps) as features, model.captured_states() as states:
        ragged_logits(model, torch.cat(blocks), widths, crowd.cache, slots=slots)
        together, last = features.take(), states.pop()
        apart = []
        for block, cache, beside in zip(blocks, crowd.alone, slots, strict=True):
            model.logits(block, cache, num_rows=1, slots=beside)
            apart.append((features.take(), states.pop()))
    assert together.shape == (1, 8, 3 * 32)
    torch.testing.assert_close(together, torch.cat([one for one, _ in apart], dim=1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, torch.cat([one for _, one in apart], dim=1), rtol=1e-9, atol=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_what_lies_behind_a_request_or_in_other_slots_changes_nothing(name: str, garbage: float) -> None:
    # Whatever a pass may have left: behind the valid length as far as the slot was ever written, and in slots that
    # wait or are free. What was never written is zero, which the cache's own tests state.
    crowd = Crowd(target(name))
    for prompt in (30, 8, 20, 25, 17):
        crowd.join(prompt)
    crowd.leave(1)
    crowd.keep([6, 15, 18, 22])
    crowd.leave(2)
    ends, written = crowd.cache.lengths, crowd.cache._ledger.written
    for layer in crowd.cache.slot_layers:
        for buffer in layer.buffers:
            for slot, end in enumerate(written):
                buffer[slot, :, ends[slot] if slot < len(ends) else 0 : end] = garbage
    crowd.step([1, 3, 2], slots=[(), (0,), ()])
    assert crowd.join() == 3
    # The slot's former request lies in it, and the pass reads further than this prompt.
    crowd.step([2, 1], active=[3, 0])
    crowd.step([1, 1, 1, 1])


@torch.inference_mode()
def test_never_written_places_may_hold_any_finite_states() -> None:
    crowd = Crowd(target("gemma3_text"))
    for prompt in (30, 8, 20):
        crowd.join(prompt)
    for layer in crowd.cache.slot_layers:
        for buffer in layer.buffers:
            for slot, end in enumerate(crowd.cache._ledger.written):
                buffer[slot, :, end:] = 1e6
    crowd.step([1, 4, 2])


def test_one_request_without_finite_states_leaves_the_others_alone() -> None:
    model = target("llama", tie_word_embeddings=False)
    embedding = model.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[7] = float("nan")
    crowd = Crowd(model)
    for _ in range(3):
        crowd.join()
    healthy = torch.tensor([1, 2, 3])
    together = ragged_logits(model, torch.tensor([1, 2, 3, 4, 7, 6, 1, 2]), [3, 3, 2], crowd.cache)
    assert together[[0, 1, 2, 6, 7]].isfinite().all() and together[[4, 5]].isnan().all()
    assert crowd.cache.leave(1) == 2
    crowd.cache.rollback([0, 0])
    crowd.cache.join()
    crowd.step([3, 1, 1], blocks=[healthy, healthy[:1], healthy[1:2]])


def _masked(
    lengths: Sequence[int], widths: Sequence[int], slots: Sequence[Sequence[int]], function: Any, **options: Any
) -> Tensor:
    cache = SlotCache(1, max_slots=8, max_tokens=64)
    for _ in lengths:
        cache.join()
    cache._ledger.lengths[:] = lengths
    with cache.placed(widths, active=None, device=torch.device("cpu")) as placement:
        return ragged_module.Plan.of(placement, slots).mask(function, **options)


def test_chunks_are_those_of_each_requests_own_positions() -> None:
    lengths, widths = [3, 9, 0], [4, 1, 2]
    mask = _masked(lengths, widths, (), chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)))
    assert mask.shape == (3, 1, 4, 10)
    for request, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        for place in range(width):
            position = length + place
            expected = [c <= position and c // 4 == position // 4 for c in range(10)]
            assert mask[request, 0, place].tolist() == expected


def test_padding_sees_something_so_that_no_row_is_empty() -> None:
    mask = _masked([0, 5], [1, 6], [(), (0, 1)], chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)))
    assert mask.any(-1).all()


def test_a_failed_pass_leaves_lengths_and_single_passes_as_they_were() -> None:
    model = target("llama")
    crowd = Crowd(model)
    for prompt in (9, 4):
        crowd.join(prompt)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = model.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        ragged_logits(model, some_tokens(6, crowd.rng), [5, 1], crowd.cache)
    handle.remove()
    assert crowd.cache.lengths == [9, 4]
    crowd.step([1, 2])


def test_what_cannot_be_right_is_refused() -> None:
    cache = SlotCache(2, max_slots=2, max_tokens=CONTEXT)
    cache.join()
    tokens = torch.tensor([1, 2, 3])
    bloom = family_model("bloom")
    bloom.model.set_attn_implementation(GROUPED)
    eager = family_model("llama")
    eager.model.set_attn_implementation("eager")
    capped = family_model("gemma2")
    for model in (bloom, eager, capped):
        with pytest.raises(InputError, match="cannot decode several requests in one pass"):
            ragged_logits(model, tokens, [3], cache)
    stretched = target("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(InputError, match="rotary positions depend on the longest request"):
        ragged_logits(stretched, tokens, [3], cache)
    with pytest.raises(InputError, match="masks by more than positions"):
        _masked([0], [2], (), lambda *_: torch.ones(()), use_vmap=True)
    llama = target("llama")
    with _patched(SlotLayer, "update", lambda self, keys, values: (keys, values)):
        with pytest.raises(InputError, match="keeps its states outside the cache"):
            ragged_logits(llama, tokens, [3], cache)
    for widths, slots, message in (
        ([2], (), "3 tokens are not blocks of"),
        ([3], [(), ()], "cannot have the siblings of 2"),
        ([3], [(1,)], "stand beside none of a chain of 1 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            ragged_logits(llama, tokens, widths, cache, slots=slots)
    assert cache.lengths == [0]


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_masked_products_is_refused(option: str) -> None:
    cache = SlotCache(1, max_slots=1, max_tokens=8)
    cache.join()
    states, mask = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with cache.placed([2], active=None, device=torch.device("cpu")) as placement:
        plan = ragged_module.Plan.of(placement, ())
        with pytest.raises(InputError, match=f"attention has {option}"):
            plan.attend(torch.nn.Identity(), states, states, states, mask, **{option: 1.0})
        for foreign in (None, mask[..., :1]):
            with pytest.raises(InputError, match="does not follow the family's masks"):
                plan.attend(torch.nn.Identity(), states, states, states, foreign)


@contextmanager
def _patched(owner: Any, name: str, changed: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, changed)
        yield


def _late_positions(of: Callable[..., Any]) -> Any:
    def changed(cls: type, *args: Any) -> Any:
        plan = of(*args)
        late = plan.positions + (plan.placement.block == 1)
        return replace(plan, positions=late)

    return classmethod(changed)


def _shifted(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: mask(*args, **options).roll(1, dims=-1)


def _nothing(*args: Any, **options: Any) -> None:
    return None


_PLAN = ragged_module.Plan
MUTANTS = {
    "positions one too far": (_PLAN, "of", _late_positions(_PLAN.of)),
    "mask shifted by one": (_PLAN, "mask", _shifted(_PLAN.mask)),
    "compaction without the copy": (SlotLayer, "copy_slot", _nothing),
    "acceptance without the move": (SlotLayer, "move", _nothing),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_shows(name: str) -> None:
    crowd = Crowd(target("llama"), seed=6)
    with _patched(*MUTANTS[name]), pytest.raises(AssertionError, match="not close"):
        crowd.play(12, most=5)


def test_without_the_zeros_what_a_request_leaves_behind_would_show() -> None:
    def write(self: Any, buffer: Tensor, states: Tensor) -> None:
        buffer[self.rows, :, self.columns] = states[0].transpose(0, 1)

    from inference.batch import Placement

    with _patched(Placement, "write", write), pytest.raises(AssertionError, match="not close"):
        test_what_lies_behind_a_request_or_in_other_slots_changes_nothing("llama", float("nan"))
