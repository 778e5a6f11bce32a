"""Objectives against slow formulas in plain Python, against finite differences, and at their limits."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.objectives import (
    Objective,
    acceptance,
    cross_entropy,
    forward_kl,
    jsd,
    lk,
    mix,
    reverse_kl,
    total_variation,
)
from inference.errors import InputError
from inference.plugins import plugins

ROWS, VOCABULARY = 5, 7


def make_logits(seed: int, *, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft = scale * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    target = scale * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return draft.to(dtype), target.to(dtype), labels


# The slow formulas: lists of floats, one position at a time, straight from the definitions.


def slow_softmax(logits: list[float], temperature: float = 1.0, top_k: int = 0) -> list[float]:
    least_kept = sorted(logits, reverse=True)[top_k - 1] if top_k else -math.inf
    powers = [math.exp(z / temperature) if z >= least_kept else 0.0 for z in logits]
    return [power / sum(powers) for power in powers]


def slow_kl(first: list[float], second: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True) if a > 0)


def slow_tv(first: list[float], second: list[float]) -> float:
    return 0.5 * sum(abs(a - b) for a, b in zip(first, second, strict=True))


def slow_jsd(target: list[float], draft: list[float], beta: float) -> float:
    mixture = [beta * t + (1 - beta) * d for t, d in zip(target, draft, strict=True)]
    return beta * slow_kl(target, mixture) + (1 - beta) * slow_kl(draft, mixture)


def slow_lk(target: list[float], draft: list[float], mode: str, eta: float) -> float:
    overlap = sum(min(t, d) for t, d in zip(target, draft, strict=True))
    if mode == "alpha":
        return -math.log(overlap)
    share = math.exp(-eta * overlap)
    return share * slow_kl(target, draft) + (1 - share) * (1 - overlap)


def slow_loss(kind: str, draft: list[float], target: list[float], label: int, options: dict[str, Any]) -> float:
    temperature, top_k = options.get("temperature", 1.0), options.get("target_top_k", 0)
    draft_probs = slow_softmax(draft, temperature)
    target_probs = slow_softmax(target, temperature, top_k)
    if kind == "forward_kl":
        return slow_kl(target_probs, draft_probs)
    if kind == "reverse_kl":
        return slow_kl(draft_probs, target_probs)
    if kind == "jsd":
        return slow_jsd(target_probs, draft_probs, options.get("beta", 0.5))
    if kind == "total_variation":
        return slow_tv(target_probs, draft_probs)
    if kind == "lk":
        return slow_lk(target_probs, draft_probs, options.get("mode", "hybrid"), options.get("eta", 3.0))
    if kind == "cross_entropy":
        return -math.log(slow_softmax(draft)[label])
    weights, inner = options["weights"], options.get("options", {})
    return math.fsum(w * slow_loss(k, draft, target, label, inner.get(k, {})) for k, w in weights.items())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("forward_kl", {"temperature": 2.0}),
    ("forward_kl", {"target_top_k": 3}),
    ("reverse_kl", {}),
    ("reverse_kl", {"temperature": 0.7}),
    ("jsd", {}),
    ("jsd", {"beta": 0.1, "temperature": 1.5}),
    ("jsd", {"beta": 0.9, "target_top_k": 2}),
    ("total_variation", {}),
    ("total_variation", {"temperature": 0.5, "target_top_k": 4}),
    ("lk", {"mode": "alpha"}),
    ("lk", {"mode": "alpha", "target_top_k": 1}),
    ("lk", {"mode": "hybrid"}),
    ("lk", {"mode": "hybrid", "eta": 1.0, "temperature": 2.0, "target_top_k": 3}),
    ("cross_entropy", {}),
    ("mix", {"weights": {"cross_entropy": 0.1, "total_variation": 0.9}}),
    ("mix", {"weights": {"jsd": 0.25, "lk": 0.75}, "options": {"jsd": {"beta": 0.3}, "lk": {"mode": "alpha"}}}),
]


def build(kind: str, options: dict[str, Any]) -> Objective:
    objective: Objective = plugins("distill.objectives")[kind].Config(**options).build()
    return objective


def test_every_objective_is_among_the_cases() -> None:
    assert set(plugins("distill.objectives")) == {kind for kind, _ in CASES}


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_equals_slow_formula(kind: str, options: dict[str, Any]) -> None:
    draft, target, labels = make_logits(1)
    expected = [slow_loss(kind, draft[n].tolist(), target[n].tolist(), int(labels[n]), options) for n in range(ROWS)]
    loss = build(kind, options)(draft, target, labels)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_fp32_and_bf16_logits_give_fp32_losses_near_the_fp64_ones(kind: str, options: dict[str, Any]) -> None:
    objective = build(kind, options)
    exact = objective(*make_logits(2))
    single = objective(*make_logits(2, dtype=torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)
    assert objective(*make_logits(2, dtype=torch.bfloat16)).dtype == torch.float32


# The hybrid holds lambda constant, which finite differences do not: it has a test of its own.
@pytest.mark.parametrize(("kind", "options"), [c for c in CASES if c[1].get("mode") != "hybrid"])
def test_gradient_matches_finite_differences(kind: str, options: dict[str, Any]) -> None:
    draft, target, labels = make_logits(3)
    objective = build(kind, options)
    draft.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: objective(logits, target, labels), (draft,))


def test_hybrid_gradient_holds_lambda_constant() -> None:
    draft, target, labels = make_logits(4)
    with torch.no_grad():
        share = torch.exp(-3.0 * acceptance(draft, target))
    draft.requires_grad_()
    (hybrid,) = torch.autograd.grad(lk.Config().build()(draft, target, labels).sum(), draft)
    divergence = forward_kl.Config().build()(draft, target, labels)
    variation = total_variation.Config().build()(draft, target, labels)
    (expected,) = torch.autograd.grad((share * divergence + (1 - share) * variation).sum(), draft)
    torch.testing.assert_close(hybrid, expected, rtol=1e-12, atol=1e-14)


DIVERGENCES = [c for c in CASES if c[0] not in ("cross_entropy", "mix") and "target_top_k" not in c[1]]


@pytest.mark.parametrize(("kind", "options"), DIVERGENCES)
def test_zero_when_draft_equals_target(kind: str, options: dict[str, Any]) -> None:
    draft, _, labels = make_logits(5)
    loss = build(kind, options)(draft, draft + 3.0, labels)  # softmax does not see a shift
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), [c for c in DIVERGENCES if c[0] in ("forward_kl", "reverse_kl", "jsd")])
def test_stationary_when_draft_equals_target(kind: str, options: dict[str, Any]) -> None:
    # Only the smooth ones: |p_t - p_d| and min(p_t, p_d) have a kink exactly there.
    draft, _, labels = make_logits(5)
    draft.requires_grad_()
    (gradient,) = torch.autograd.grad(build(kind, options)(draft, draft.detach() + 3.0, labels).sum(), draft)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_total_variation_is_zero_when_equal_and_one_when_disjoint() -> None:
    _, _, labels = make_logits(6)
    far_left = torch.full((ROWS, VOCABULARY), -1e4)
    far_left[:, 0] = 0.0
    objective = total_variation.Config().build()
    assert objective(far_left, far_left, labels).tolist() == [0.0] * ROWS
    assert objective(far_left, far_left.flip(-1), labels).tolist() == [1.0] * ROWS


def test_jsd_tends_to_forward_kl_at_small_beta() -> None:
    # JSD / beta = KL(p_t || m) + (1 - beta) / beta KL(p_d || m); the second term is O(beta) because m - p_d is.
    logits = make_logits(7)
    small = jsd.Config(beta=1e-6).build()(*logits) / 1e-6
    torch.testing.assert_close(small, forward_kl.Config().build()(*logits), rtol=1e-3, atol=1e-4)


def test_jsd_tends_to_reverse_kl_at_large_beta() -> None:
    logits = make_logits(8)
    large = jsd.Config(beta=1 - 1e-6).build()(*logits) / 1e-6
    torch.testing.assert_close(large, reverse_kl.Config().build()(*logits), rtol=1e-3, atol=1e-4)


def test_symmetric_jsd_does_not_care_which_side_is_which_and_stays_under_log_two() -> None:
    draft, target, labels = make_logits(9, scale=20.0)
    objective = jsd.Config(beta=0.5).build()
    torch.testing.assert_close(objective(draft, target, labels), objective(target, draft, labels))
    assert objective(draft, target, labels).max() <= math.log(2.0) + 1e-12


def test_lk_alpha_gradient_is_that_of_total_variation_divided_by_acceptance() -> None:
    draft, target, labels = make_logits(10)
    overlap = acceptance(draft, target)
    draft.requires_grad_()
    (direct,) = torch.autograd.grad(lk.Config(mode="alpha").build()(draft, target, labels).sum(), draft)
    (variation,) = torch.autograd.grad(total_variation.Config().build()(draft, target, labels).sum(), draft)
    torch.testing.assert_close(direct, variation / overlap.unsqueeze(-1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("objective", [forward_kl.Config().build(), lk.Config(mode="alpha").build()])
def test_one_hot_target_gives_cross_entropy(objective: Objective) -> None:
    draft, _, labels = make_logits(11)
    one_hot = torch.zeros_like(draft).scatter_(-1, labels.unsqueeze(-1), 1e4)
    expected = cross_entropy.Config().build()(draft, one_hot, labels)
    torch.testing.assert_close(objective(draft, one_hot, labels), expected, rtol=1e-12, atol=1e-12)


def test_forward_kl_gradient_is_draft_minus_target() -> None:
    draft, target, labels = make_logits(12)
    draft.requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl.Config().build()(draft, target, labels).sum(), draft)
    torch.testing.assert_close(gradient, draft.detach().softmax(-1) - target.softmax(-1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_extreme_logits_keep_loss_and_gradient_finite(kind: str, options: dict[str, Any], size: float) -> None:
    _, _, labels = make_logits(13)
    rows = list(itertools.islice(itertools.product([-size, 0.0, size], repeat=2), ROWS))
    draft, target = torch.zeros(ROWS, VOCABULARY), torch.zeros(ROWS, VOCABULARY)
    for n, (first, second) in enumerate(rows):
        draft[n, 0], target[n, 1] = first, second
    draft[-1, 2], target[-1, 3] = size, size  # no overlap at all
    draft.requires_grad_()
    loss = build(kind, options)(draft, target, labels)
    (gradient,) = torch.autograd.grad(loss.sum(), draft)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_lk_alpha_still_pulls_where_total_variation_has_faded() -> None:
    # Overlap is about e^-100, below what fp32 holds: TV's gradient is 0, that of -log overlap is of order 1.
    labels = torch.zeros(1, dtype=torch.int64)
    target = torch.tensor([[120.0, 0.0, 0.0]])
    draft = torch.tensor([[0.0, 120.0, 0.0]], requires_grad=True)
    (faded,) = torch.autograd.grad(total_variation.Config().build()(draft, target, labels).sum(), draft)
    (direct,) = torch.autograd.grad(lk.Config(mode="alpha").build()(draft, target, labels).sum(), draft)
    assert faded.abs().max() < 1e-20
    assert direct.abs().max() > 0.4


def test_masked_target_logits_count_as_no_probability() -> None:
    draft, target, labels = make_logits(14)
    target[:, 2] = -math.inf
    kept = [v for v in range(VOCABULARY) if v != 2]
    expected = [
        slow_kl([*slow_softmax(target[n, kept].tolist())], [slow_softmax(draft[n].tolist())[v] for v in kept])
        for n in range(ROWS)
    ]
    loss = forward_kl.Config().build()(draft, target, labels)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_truncation_to_more_tokens_than_there_are_changes_nothing() -> None:
    logits = make_logits(15)
    whole, cut = forward_kl.Config().build(), forward_kl.Config(target_top_k=VOCABULARY + 5).build()
    assert torch.equal(whole(*logits), cut(*logits))


def test_acceptance_is_one_minus_total_variation_and_is_what_sampling_accepts() -> None:
    draft, target, labels = make_logits(16)
    overlap = acceptance(draft, target)
    torch.testing.assert_close(overlap, 1 - total_variation.Config().build()(draft, target, labels))
    # The rule itself: draw from the draft, accept with min(1, p_t / p_d). 20,000 draws: sd of the share <= 0.0036.
    dice = random.Random(0)
    draft_probs, target_probs = slow_softmax(draft[0].tolist()), slow_softmax(target[0].tolist())
    tokens = dice.choices(range(VOCABULARY), weights=draft_probs, k=20_000)
    accepted = sum(dice.random() < target_probs[t] / draft_probs[t] for t in tokens) / 20_000
    assert abs(accepted - float(overlap[0])) < 5 * 0.0036


def test_target_gets_no_gradient() -> None:
    draft, target, labels = make_logits(17)
    target.requires_grad_()
    loss = forward_kl.Config().build()(draft.requires_grad_(), target, labels).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert target.grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: forward_kl.Config(temperature=0.0), "forward_kl: temperature is 0.0: choose a finite number above 0"),
        (lambda: forward_kl.Config(target_top_k=-1), "target_top_k is -1: choose 0"),
        (lambda: jsd.Config(beta=0.0), "beta is 0.0.*objective=forward_kl"),
        (lambda: jsd.Config(beta=1.0), "beta is 1.0.*objective=reverse_kl"),
        (lambda: lk.Config(mode="beta"), "mode is 'beta': choose one of alpha, hybrid"),
        (lambda: lk.Config(eta=-1.0), "eta is -1.0"),
        (lambda: mix.Config(weights={"jsd": 0.5}), "sum to 0.5: make it 1"),
        (lambda: mix.Config(weights={"jsd": 1.5, "lk": -0.5}), "weight of lk is -0.5"),
        (lambda: mix.Config(weights={"mix": 1.0}), "name 'mix' itself"),
        (lambda: mix.Config(weights={"jsd": 1.0}, options={"lk": {}}), "options for lk, which is not in the mix"),
        (lambda: mix.Config(weights={"jsd": 1.0}, options={"jsd": {"bta": 1}}), "options of jsd: .*bta"),
        (lambda: mix.Config(weights={"jsd": 1.0}, options={"jsd": {"beta": 2.0}}), "jsd: beta is 2.0"),
    ],
)
def test_bad_options_are_named_with_a_remedy(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_kind_in_a_mix_lists_the_kinds_there_are() -> None:
    with pytest.raises(InputError, match=r"unknown kind 'hinge'.*choose one of cross_entropy, forward_kl"):
        mix.Config(weights={"hinge": 1.0})


def test_zero_weight_leaves_a_kind_out() -> None:
    logits = make_logits(18)
    mixed = mix.Config(weights={"cross_entropy": 0.0, "total_variation": 1.0}).build()
    assert torch.equal(mixed(*logits), total_variation.Config().build()(*logits))
