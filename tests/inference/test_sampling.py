"""Logits processing against slow plain formulas and against transformers' own processors."""

import math
import random

import pytest
import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.sampling import process_logits, token_probs
from inference.sampling_settings import DecodeConfig, SamplingSettings

V = 12
NOTHING = torch.empty(0, dtype=torch.long)
CONTEXT = torch.tensor([3, 5, 3, 7])
BLOCK = torch.tensor([1, 9, 0])


def _logits(rows: int = 4, *, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plain(row: list[float], seen: set[int], settings: SamplingSettings) -> list[float]:
    """The distribution of one row by the definitions, one token at a time."""
    penalty = settings.repetition_penalty
    scores = [(x / penalty if x > 0 else x * penalty) if t in seen else x for t, x in enumerate(row)]
    scores = [x / settings.temperature for x in scores]
    kept = sorted(range(V), key=lambda t: -scores[t])
    if settings.top_k:
        kept = kept[: settings.top_k]
    mass = sum(math.exp(scores[t]) for t in kept)
    nucleus: list[int] = []
    reached = 0.0
    for token in kept:
        if settings.top_p < 1.0 and reached >= settings.top_p:
            break
        nucleus.append(token)
        reached += math.exp(scores[token]) / mass
    total = sum(math.exp(scores[t]) for t in nucleus)
    return [math.exp(scores[t]) / total if t in nucleus else 0.0 for t in range(V)]


def _random_settings(rng: random.Random) -> SamplingSettings:
    return SamplingSettings(
        temperature=rng.choice((0.3, 0.7, 1.0, 1.7)),
        top_k=rng.choice((0, 1, 4, V, 50)),
        top_p=rng.choice((0.1, 0.6, 0.9, 1.0)),
        repetition_penalty=rng.choice((0.8, 1.0, 1.3)),
    )


@pytest.mark.parametrize("seed", range(40))
def test_rows_equal_the_plain_formulas(seed: int) -> None:
    settings = _random_settings(random.Random(seed))
    logits = _logits(seed=seed)
    probs = token_probs(logits, context=CONTEXT, block=BLOCK, settings=settings)
    for i in range(4):
        # Row i predicts the token after the context and the first i proposed tokens.
        seen = {*CONTEXT.tolist(), *BLOCK[:i].tolist()}
        assert probs[i].tolist() == pytest.approx(_plain(logits[i].tolist(), seen, settings), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_rows_equal_transformers_own_processors(seed: int) -> None:
    settings = _random_settings(random.Random(100 + seed))
    logits = _logits(seed=seed)
    processed = process_logits(logits, context=CONTEXT, block=BLOCK, settings=settings)
    for i in range(4):
        scores, ids = logits[i : i + 1].clone(), torch.cat([CONTEXT, BLOCK[:i]])[None]
        steps: list[LogitsProcessor] = [RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)]
        steps += [TemperatureLogitsWarper(settings.temperature)] if settings.temperature != 1.0 else []
        steps += [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        steps += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1.0 else []
        for step in steps:
            scores = step(ids, scores)
        torch.testing.assert_close(processed[i], scores[0])


def test_nucleus_by_hand() -> None:
    # Shares 0.5, 0.3, 0.2: a mass of 0.7 is reached by the first two, which become 0.625 and 0.375.
    logits = torch.tensor([[0.3, 0.5, 0.2]], dtype=torch.float64).log()
    probs = token_probs(logits, context=NOTHING, block=NOTHING, settings=SamplingSettings(temperature=1.0, top_p=0.7))
    assert probs[0].tolist() == pytest.approx([0.375, 0.625, 0.0])


def test_the_most_probable_token_survives_any_nucleus() -> None:
    settings = SamplingSettings(temperature=1.0, top_p=1e-9)
    probs = token_probs(_logits(), context=NOTHING, block=BLOCK, settings=settings)
    assert torch.equal(probs.argmax(-1), _logits().argmax(-1))
    assert probs.max(-1).values.tolist() == [1.0] * 4


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens_only() -> None:
    logits = torch.tensor([[4.0, -4.0, 2.0], [4.0, -4.0, 2.0]])
    settings = SamplingSettings(repetition_penalty=2.0)
    processed = process_logits(logits, context=torch.tensor([0]), block=torch.tensor([1]), settings=settings)
    # Row 0 has seen token 0; row 1 the proposed token 1 as well.
    assert processed.tolist() == [[2.0, -4.0, 2.0], [2.0, -8.0, 2.0]]


def test_rows_do_not_depend_on_later_tokens_of_the_block() -> None:
    settings = SamplingSettings(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.4)
    whole = process_logits(_logits(), context=CONTEXT, block=BLOCK, settings=settings)
    for i in range(4):
        alone = process_logits(
            _logits()[i : i + 1], context=torch.cat([CONTEXT, BLOCK[:i]]), block=NOTHING, settings=settings
        )
        assert torch.equal(whole[i], alone[0])


def test_the_callers_logits_are_not_changed() -> None:
    logits = _logits()
    settings = SamplingSettings(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0)
    process_logits(logits, context=CONTEXT, block=BLOCK, settings=settings)
    assert torch.equal(logits, _logits())


def test_half_precision_is_processed_in_fp32_and_fp64_stays() -> None:
    settings = SamplingSettings(temperature=1.0)
    half = process_logits(_logits().bfloat16(), context=NOTHING, block=BLOCK, settings=settings)
    assert half.dtype == torch.float32
    assert process_logits(_logits(), context=NOTHING, block=BLOCK, settings=settings).dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; use 0 for greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; use 0 to keep every token"),
        ({"top_p": 0.0}, r"top_p is 0.0; use a share in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; use 1 for none"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**values)  # type: ignore[arg-type]


def test_decode_settings_are_refused_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; use at least 1"):
        DecodeConfig(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"top_p is 2.0"):
        DecodeConfig(top_p=2.0)


def test_decode_settings_carry_over_to_a_temperature() -> None:
    settings = DecodeConfig(top_k=7, top_p=0.9, repetition_penalty=1.2).settings(0.8)
    assert settings == SamplingSettings(temperature=0.8, top_k=7, top_p=0.9, repetition_penalty=1.2)
    assert not settings.greedy and DecodeConfig().settings(0.0).greedy
