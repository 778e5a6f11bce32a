"""The chunked objective against the plain one: same numbers, and never more rows of logits than a chunk."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.chunked import ChunkedLoss, chunked_objective
from distill.objectives import Objective, acceptance, forward_kl, lk, mix, reverse_kl, total_variation

POSITIONS, HIDDEN, VOCABULARY = 23, 6, 31

OBJECTIVES: dict[str, Objective] = {
    "forward_kl": forward_kl.Config().build(),
    "reverse_kl": reverse_kl.Config().build(),
    "lk_hybrid": lk.Config().build(),
    "mix": mix.Config().build(),
}


class Case:
    """Random hidden states, a head and a teacher, the same for the same dtype."""

    def __init__(self, dtype: torch.dtype, *, bias: bool = True, positions: int = POSITIONS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(positions, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
        self.target = 2 * torch.randn(positions, VOCABULARY, generator=generator, dtype=dtype)
        self.labels = torch.randint(VOCABULARY, (positions,), generator=generator)
        self.weights = torch.rand(positions, generator=generator, dtype=dtype)
        self.weights[3] = 0.0
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))

    def chunked(self, objective: Objective, chunk_tokens: int, hidden: Tensor | None = None) -> ChunkedLoss:
        return chunked_objective(
            self.hidden if hidden is None else hidden,
            draft_head=self.head,
            target_logits=lambda rows: self.target[rows],
            labels=self.labels,
            weights=self.weights,
            objective=objective,
            chunk_tokens=chunk_tokens,
        )

    def plain(self, objective: Objective) -> Tensor:
        return (self.weights * objective(self.head(self.hidden), self.target, self.labels)).sum()

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [self.hidden, *self.head.parameters()]))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, POSITIONS - 1, POSITIONS, POSITIONS + 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_the_plain_computation(name: str, chunk_tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    case, objective = Case(dtype), OBJECTIVES[name]
    plain, chunked = case.plain(objective), case.chunked(objective, chunk_tokens)
    torch.testing.assert_close(chunked.loss_sum, plain, rtol=tolerance, atol=tolerance)
    for got, expected in zip(case.gradients(3.0 * chunked.loss_sum), case.gradients(3.0 * plain), strict=True):
        assert got.dtype == expected.dtype
        # 1e-6 of the gradient's own size: sums over chunks run in another order.
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_sums_of_weight_and_acceptance() -> None:
    case = Case(torch.float64)
    got = case.chunked(OBJECTIVES["forward_kl"], 5)
    logits = case.head(case.hidden)
    torch.testing.assert_close(got.weight_sum, case.weights.sum())
    torch.testing.assert_close(got.acceptance_sum, (case.weights * acceptance(logits, case.target)).sum())
    assert not got.acceptance_sum.requires_grad


def test_gradcheck_with_respect_to_hidden_states() -> None:
    case = Case(torch.float64, positions=5)
    objective = OBJECTIVES["forward_kl"]
    assert torch.autograd.gradcheck(lambda hidden: case.chunked(objective, 2, hidden).loss_sum, (case.hidden,))


def test_gradcheck_with_respect_to_the_head() -> None:
    case = Case(torch.float64, positions=5)
    weight, bias = case.head.weight, case.head.bias

    def loss(*_: Tensor) -> Tensor:
        return case.chunked(OBJECTIVES["mix"], 2).loss_sum

    assert torch.autograd.gradcheck(loss, (weight, bias))


def test_frozen_head_gets_no_gradient_and_hidden_states_still_do() -> None:
    case = Case(torch.float32)
    case.head.requires_grad_(False)
    case.chunked(OBJECTIVES["forward_kl"], 4).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert case.head.weight.grad is None
    assert case.hidden.grad is not None


def test_frozen_hidden_states_get_no_gradient_and_the_head_still_does() -> None:
    case = Case(torch.float64)
    hidden = case.hidden.detach()
    case.chunked(OBJECTIVES["forward_kl"], 4, hidden).loss_sum.backward()  # type: ignore[no-untyped-call]
    expected = case.gradients(case.plain(OBJECTIVES["forward_kl"]))[1]
    assert case.head.weight.grad is not None
    torch.testing.assert_close(case.head.weight.grad, expected)


def test_only_the_trained_part_of_a_head_gets_a_gradient() -> None:
    case = Case(torch.float64)
    head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), case.head)
    head[1].requires_grad_(False)
    case.head = head  # type: ignore[assignment]
    case.chunked(OBJECTIVES["forward_kl"], 4).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert head[0].weight.grad is not None
    assert head[1].weight.grad is None


def test_head_tied_to_an_embedding_adds_both_gradients() -> None:
    tied = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)
    case = Case(torch.float64, bias=False)
    case.head.weight = tied.weight
    objective = OBJECTIVES["forward_kl"]
    hidden = tied(case.labels).tanh()
    (got,) = torch.autograd.grad(case.chunked(objective, 4, hidden).loss_sum, [tied.weight])
    hidden = tied(case.labels).tanh()
    plain = (case.weights * objective(case.head(hidden), case.target, case.labels)).sum()
    (expected,) = torch.autograd.grad(plain, [tied.weight])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_evaluation_without_gradients_gives_the_same_sums() -> None:
    case = Case(torch.float32)
    trained = case.chunked(OBJECTIVES["mix"], 4)
    with torch.no_grad():
        measured = case.chunked(OBJECTIVES["mix"], 4)
    assert not measured.loss_sum.requires_grad
    assert torch.equal(measured.loss_sum, trained.loss_sum.detach())
    assert torch.equal(measured.acceptance_sum, trained.acceptance_sum)


def test_teacher_is_asked_once_a_chunk_in_order_without_gradients() -> None:
    case, asked = Case(torch.float32), []

    def target_logits(rows: slice) -> Tensor:
        asked.append((rows.start, rows.stop, torch.is_grad_enabled()))
        return case.target[rows]

    chunked_objective(
        case.hidden,
        draft_head=case.head,
        target_logits=target_logits,
        labels=case.labels,
        weights=case.weights,
        objective=OBJECTIVES["mix"],
        chunk_tokens=10,
    ).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert asked == [(0, 10, False), (10, 20, False), (20, 23, False)]


def test_under_bf16_autocast_gradients_are_close_to_fp32_and_in_the_parameters_format() -> None:
    case = Case(torch.float32)
    exact = case.gradients(case.chunked(OBJECTIVES["mix"], 4).loss_sum)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            case.head(case.hidden)  # leaves a cast weight without a graph in autocast's cache
        loss = case.chunked(OBJECTIVES["mix"], 4).loss_sum
    assert loss.dtype == torch.float32
    for got, expected in zip(case.gradients(loss), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


class WideTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts rows of tensors as wide as the vocabulary: the largest ever made, and the most alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest, self.most_alive, self._alive = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self._note(tensor, tensor.numel() // VOCABULARY)
        return result

    def _note(self, tensor: Tensor, rows: int) -> None:
        self.largest = max(self.largest, rows)
        self._alive += rows
        self.most_alive = max(self.most_alive, self._alive)
        weakref.finalize(tensor, self._forget, rows)

    def _forget(self, rows: int) -> None:
        self._alive -= rows


def wide_rows(run: Callable[[Case], Tensor], positions: int) -> WideTensors:
    case = Case(torch.float32, positions=positions)
    seen = WideTensors()
    with seen:
        run(case).backward()  # type: ignore[no-untyped-call]
    return seen


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_logits_wider_than_a_chunk_are_ever_made(name: str) -> None:
    chunk_tokens = 8  # at least HIDDEN, so that a transposed weight [HIDDEN, VOCABULARY] does not count as logits
    short = wide_rows(lambda case: case.chunked(OBJECTIVES[name], chunk_tokens).loss_sum, 40)
    long = wide_rows(lambda case: case.chunked(OBJECTIVES[name], chunk_tokens).loss_sum, 400)
    assert short.largest == long.largest == chunk_tokens
    assert long.most_alive == short.most_alive  # what is alive depends on the chunk, not on the number of positions


def test_the_detector_sees_the_plain_computation() -> None:
    assert wide_rows(lambda case: case.plain(total_variation.Config().build()), 40).largest == 40


def test_bad_arguments_are_named() -> None:
    case = Case(torch.float32)
    with pytest.raises(ValueError, match="chunk_tokens is 0: choose at least 1"):
        case.chunked(OBJECTIVES["mix"], 0)
    with pytest.raises(ValueError, match=r"hidden \(22, 6\), labels \(23,\).*flatten"):
        case.chunked(OBJECTIVES["mix"], 4, case.hidden[1:])
