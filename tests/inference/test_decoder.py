"""The decoding loop: its limits, its counts, and greedy output equal to a plain loop over the target."""

from collections.abc import Callable

import pytest
import torch

from inference.decoder import decode
from inference.drafters import Drafter, Proposal
from inference.drafters.lookup import LookupDrafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.errors import InputError
from inference.lookahead import Lookahead
from inference.lookahead.confidence import ConfidenceLookahead
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.model import CausalModel
from inference.randomness import Source, TorchSource
from inference.request import PARTS, Decoded, Request
from inference.sampling_settings import SamplingSettings
from tests.inference.families import CONTEXT, VOCAB, family_model, greedy_reference
from tests.inference.law import MemoModel, tiny_model

GREEDY = SamplingSettings()


class Counting(MemoModel):
    """A target that writes 1 after 0, 2 after 1, ..., 0 after 7; notes how long its contexts grew."""

    def __init__(self) -> None:
        super().__init__(tiny_model(0, vocab=8))
        self.longest = 0

    def row(self, prefix: tuple[int, ...]) -> torch.Tensor:
        self.longest = max(self.longest, len(prefix))
        return torch.eye(8, dtype=torch.float64)[(prefix[-1] + 1) % 8]


class Scripted:
    """Proposes a list of tokens a round, as far as it may; nothing when the script is over."""

    kind = "scripted"

    def __init__(self, *script: list[int]) -> None:
        self.script = list(script)
        self.limits: list[int] = []
        self.outcomes: list[int] = []

    def begin(self, prompt: torch.Tensor) -> None:
        pass

    def propose(
        self, context: torch.Tensor, *, limit: int, lookahead: Lookahead, settings: SamplingSettings, generator: Source
    ) -> Proposal:
        self.limits.append(limit)
        tokens = self.script.pop(0) if self.script else []
        return Proposal(torch.tensor(tokens[:limit], dtype=torch.long))

    def rollback(self, num_accepted: int) -> None:
        self.outcomes.append(num_accepted)

    def nbytes(self) -> int:
        return 0


def _decode(
    target: CausalModel,
    drafter: Drafter,
    prompt: list[int],
    *,
    tokens: int = 10,
    stop: frozenset[int] = frozenset(),
    lookahead: Lookahead | None = None,
    settings: SamplingSettings = GREEDY,
    on_tokens: Callable[[list[int]], None] | None = None,
    seed: int = 0,
) -> Decoded:
    return decode(
        target,
        drafter,
        torch.tensor(prompt, dtype=torch.long),
        request=Request(settings=settings, max_new_tokens=tokens, stop_tokens=stop),
        lookahead=lookahead or FixedLookahead(3),
        generator=TorchSource.seeded(seed),
        on_tokens=on_tokens,
    )


def test_counts_by_hand() -> None:
    drafter = Scripted([1, 2, 7], [4, 5, 6], [], [5])
    result = _decode(Counting(), drafter, [5, 0])
    # Round 1: 1, 2 stand, 7 is replaced by 3. Round 2: all stand, bonus 7. Round 3: nothing proposed, 0.
    # Round 4: 5 is replaced by 1. Round 5: one token is left, and the target writes it itself.
    assert result.tokens == [1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert result.passes == 5
    assert result.tau == 2.0
    assert result.proposed == [3, 2, 2]
    assert result.accepted == [2, 2, 1]
    assert result.blocks == {3: 2, 0: 2, 1: 1}
    assert drafter.outcomes == [2, 3, 0, 0, 0]


def test_a_position_after_a_rejection_was_not_verified() -> None:
    # The first of three is wrong, so of this block only position 1 counts as proposed.
    result = _decode(Counting(), Scripted([5, 2, 3]), [0], tokens=4)
    assert (result.proposed, result.accepted, result.blocks[3]) == ([1, 0, 0], [0, 0, 0], 1)


def test_no_more_is_proposed_than_the_answer_has_room_for() -> None:
    drafter = Scripted([1, 2, 3], [5, 6, 7])
    result = _decode(Counting(), drafter, [0], tokens=6)
    # 1 2 3 4 leave two tokens: one may be proposed, and the target adds the other.
    assert result.tokens == [1, 2, 3, 4, 5, 6]
    assert drafter.limits == [3, 1]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
def test_exactly_max_new_tokens_are_written(tokens: int) -> None:
    drafter = Scripted(*[[(i + j) % 8 for j in range(3)] for i in range(1, 20)])
    assert len(_decode(Counting(), drafter, [0], tokens=tokens).tokens) == tokens


@pytest.mark.parametrize(
    ("stop", "tokens"), [({2}, [1, 2]), ({4}, [1, 2, 3, 4]), ({3, 1}, [1]), ({6}, [1, 2, 3, 4, 5, 6])]
)
def test_a_stop_token_ends_the_answer_inside_a_block(stop: set[int], tokens: list[int]) -> None:
    # The first block is 1 2 3 and the bonus 4: proposed tokens and the bonus may both be stops.
    result = _decode(Counting(), Scripted([1, 2, 3], [5, 6, 7]), [0], stop=frozenset(stop))
    assert result.tokens == tokens


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    assert _decode(Counting(), NoDrafter(), [2, 3], tokens=3, stop=frozenset({2})).tokens == [4, 5, 6]


def test_the_context_limit_ends_the_answer_inside_a_block() -> None:
    target = Counting()
    drafter = Scripted([5, 6, 7], [1, 2, 3])
    result = _decode(target, drafter, [i % 8 for i in range(61)], tokens=50)
    # 64 positions hold the prompt's 61 tokens and three more.
    assert result.tokens == [5, 6, 7]
    assert drafter.limits == [2]
    assert target.longest < target.context_limit


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 3])
def test_a_model_with_learned_positions_is_never_asked_beyond_them(length: int) -> None:
    target, drafter = family_model("gpt2"), ModelDrafter(family_model("gpt2", seed=1))
    prompt = [i % VOCAB for i in range(length)]
    assert len(_decode(target, drafter, prompt, tokens=50).tokens) == CONTEXT - length


def test_a_draft_with_a_shorter_context_than_the_target_falls_silent() -> None:
    target, draft = family_model("gpt2"), family_model("gpt2", max_position_embeddings=32)
    for length in (20, 31, 33, 40):
        prompt = [(7 * i) % VOCAB for i in range(length)]
        result = _decode(target, ModelDrafter(draft), prompt, tokens=30)
        assert result.tokens == greedy_reference(target, torch.tensor(prompt), 30)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"the prompt has no tokens \[prompt\]: give some text"):
        _decode(Counting(), NoDrafter(), [])


@pytest.mark.parametrize("length", [64, 70])
def test_a_prompt_without_room_for_an_answer_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"the prompt has {length} tokens, the context holds 64"):
        _decode(Counting(), NoDrafter(), [0] * length)


def test_an_answer_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; use at least 1"):
        Request(settings=GREEDY, max_new_tokens=0)


def test_target_only_emits_one_token_a_pass() -> None:
    result = _decode(Counting(), NoDrafter(), [0], tokens=7)
    assert (result.tau, result.passes, result.proposed, result.blocks) == (1.0, 7, [], {0: 7})


def test_streamed_tokens_are_the_tokens_round_by_round() -> None:
    rounds: list[list[int]] = []
    result = _decode(
        Counting(), Scripted([1, 2, 7], [4, 5, 6]), [0], stop=frozenset({5}), on_tokens=lambda t: rounds.append(list(t))
    )
    assert rounds == [[1, 2, 3], [4, 5]]
    assert result.tokens == [1, 2, 3, 4, 5]


def test_seconds_add_up_and_every_part_is_there() -> None:
    result = _decode(family_model("llama"), ModelDrafter(family_model("llama", seed=1)), [1, 2, 3])
    assert tuple(result.seconds) == PARTS
    assert all(seconds >= 0.0 for seconds in result.seconds.values())
    assert result.seconds["draft"] > 0.0 and result.seconds["verify"] > 0.0
    assert result.total_seconds == pytest.approx(sum(result.seconds.values()))


def test_the_caches_largest_size_is_reported() -> None:
    target = family_model("llama")
    # Two layers, keys and values, two heads of eight, 256 positions of eight bytes.
    assert _decode(target, NoDrafter(), [1, 2, 3]).cache_nbytes == 2 * 2 * 2 * 8 * 256 * 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_leaves_nothing_behind_in_the_drafter(temperature: float) -> None:
    target, settings = family_model("llama"), SamplingSettings(temperature=temperature)
    used = ModelDrafter(family_model("llama", seed=1))
    _decode(target, used, [9, 8, 7], tokens=20, settings=settings)
    fresh = ModelDrafter(family_model("llama", seed=1))
    again, first = (_decode(target, d, [1, 2], tokens=20, settings=settings) for d in (used, fresh))
    assert again.tokens == first.tokens
    assert again.accepted == first.accepted


def test_the_same_seed_gives_the_same_sample_and_another_seed_another() -> None:
    target, drafter = family_model("llama"), ModelDrafter(family_model("llama", seed=1))
    settings = SamplingSettings(temperature=1.5)
    samples = [_decode(target, drafter, [1, 2], tokens=20, settings=settings, seed=seed).tokens for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]


POLICIES: dict[str, Callable[[], Lookahead]] = {
    "fixed": lambda: FixedLookahead(4),
    "confidence": lambda: ConfidenceLookahead(4, threshold=0.2),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_neox", "phi"])
def test_greedy_output_equals_a_plain_uncached_loop(name: str, policy: str) -> None:
    target = family_model(name)
    # A draft that agrees often and not always: the target with its weights shaken.
    shaken = family_model(name)
    generator = torch.Generator().manual_seed(5)
    for parameter in shaken.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.15 * parameter.data.std(correction=0) * noise
    prompt = torch.randint(VOCAB, (12,), generator=generator)
    expected = greedy_reference(target, prompt, 60)
    drafters: list[Drafter] = [
        ModelDrafter(shaken),
        ModelDrafter(family_model(name, seed=1)),
        LookupDrafter(LookupSettings(longest=3, shortest=1)),
        NoDrafter(),
    ]
    proposed = 0
    for drafter in drafters:
        result = _decode(target, drafter, prompt.tolist(), tokens=60, lookahead=POLICIES[policy]())
        assert result.tokens == expected, drafter.kind
        proposed += sum(result.proposed)
    assert proposed > 20


def test_greedy_output_with_a_repetition_penalty_equals_a_plain_loop() -> None:
    target, penalty = family_model("llama"), 1.3
    written = [1, 2, 3]
    for _ in range(40):
        with torch.inference_mode():
            row = target.model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].tolist()
        seen = set(written)
        scores = [(x / penalty if x > 0 else x * penalty) if t in seen else x for t, x in enumerate(row)]
        written.append(max(range(VOCAB), key=lambda t: scores[t]))
    settings = SamplingSettings(repetition_penalty=penalty)
    for seed in (0, 1):
        drafter = ModelDrafter(family_model("llama", seed=seed))
        assert _decode(target, drafter, [1, 2, 3], tokens=40, settings=settings).tokens == written[3:]
