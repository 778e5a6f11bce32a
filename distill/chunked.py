"""An objective over many positions without ever holding their logits. Not an objective: it runs one.

For V = 49,152 and 8,192 positions one fp32 logits tensor is 1.6 GB, and a loss with its gradient holds several. Here
each chunk of positions goes through the head, the loss and back to the hidden states at once, inside one autograd
function; only the gradients [N, D] and those of the head outlive a chunk. `backward` then merely scales them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from distill.objectives import Objective, acceptance

TargetLogits = Callable[[slice], Tensor]


@dataclass(frozen=True)
class ChunkedLoss:
    """Sums over all positions; divide once, at the end.

    Attributes:
        loss_sum: sum of weight x loss, a scalar that carries the gradient (none under `torch.no_grad`).
        weight_sum: sum of the weights, a scalar.
        acceptance_sum: sum of weight x (1 - TV), a scalar: expected acceptance when sampling at temperature 1.
        acceptances: 1 - TV of each position, unweighted, [N].
    """

    loss_sum: Tensor
    weight_sum: Tensor
    acceptance_sum: Tensor
    acceptances: Tensor


@dataclass(frozen=True)
class _Plan:
    """What a chunk needs besides the differentiable inputs."""

    head: nn.Module
    names: tuple[str, ...]  # the head's parameters that take a gradient
    target_logits: TargetLogits
    labels: Tensor  # shape: [N]
    weights: Tensor  # shape: [N]
    objective: Objective
    chunk_tokens: int

    def chunks(self) -> list[slice]:
        total = self.labels.shape[0]
        return [slice(at, min(at + self.chunk_tokens, total)) for at in range(0, total, self.chunk_tokens)]

    def sums(self, hidden: Tensor, parameters: Sequence[Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Return the chunk's weighted loss (differentiable) and the acceptance of each position, [n]."""
        draft_logits = functional_call(self.head, dict(zip(self.names, parameters, strict=True)), (hidden,))
        with torch.no_grad():
            target_logits = self.target_logits(rows)  # shape: [n, V]
        weights = self.weights[rows]
        loss = self.objective(draft_logits, target_logits, self.labels[rows])
        return (weights * loss).sum(), acceptance(draft_logits, target_logits).to(loss.dtype)


class _ChunkedSum(torch.autograd.Function):
    """Forward computes the loss and, chunk by chunk, its gradients; backward scales them."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [bool(ctx.needs_input_grad[1]), *[True] * len(parameters)]
        hidden_grad = torch.zeros_like(hidden) if wanted[0] else None
        # Fresh leaves: the gradient of the head stops here, whatever autocast or another graph did with the originals.
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        head_grads = [torch.zeros_like(leaf, dtype=_sum_dtype(leaf)) for leaf in leaves]
        loss_sum = plan.weights.new_zeros(())
        measured = plan.weights.new_zeros(hidden.shape[0])
        for rows in plan.chunks():
            piece = hidden[rows].detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                loss, counts = plan.sums(piece, leaves, rows)
                inputs = ([piece] if hidden_grad is not None else []) + leaves
                with torch.autocast(hidden.device.type, enabled=False):
                    grads = list(torch.autograd.grad(loss, inputs))
            if hidden_grad is not None:
                hidden_grad[rows] = grads.pop(0)
            for total, grad in zip(head_grads, grads, strict=True):
                total += grad
            loss_sum += loss.detach()
            measured[rows] = counts
        ctx.save_for_backward(hidden_grad, *[g.to(p.dtype) for g, p in zip(head_grads, parameters, strict=True)])
        ctx.mark_non_differentiable(measured)
        return loss_sum, measured

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors]


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def chunked_objective(
    hidden: Tensor,  # shape: [N, D]
    *,
    draft_head: nn.Module,
    target_logits: TargetLogits,
    labels: Tensor,  # shape: [N]
    weights: Tensor,  # shape: [N]
    objective: Objective,
    chunk_tokens: int,
) -> ChunkedLoss:
    """Sum an objective over N positions with at most `chunk_tokens` rows of logits alive at once.

    Equal to computing all logits at once, in value and in gradient. With gradients disabled nothing but the values is
    computed. The result can be differentiated once.

    Args:
        hidden: last hidden states of the draft, [N, D]; a gradient is returned if it takes one.
        draft_head: maps [n, D] to [n, V]; parameters of it that require a gradient get one (tied weights included).
        target_logits: gives the target's logits [n, V] for a slice of positions; called once a chunk, in order, without
            gradients.
        labels: the tokens really written, [N], each in [0, V), also where the weight is 0.
        weights: how much each position counts, [N]; 0 leaves a position out of every sum.
        objective: the loss of each position.
        chunk_tokens: positions a chunk, at least 1.

    Returns:
        Sums in fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError: chunk_tokens below 1, or shapes that do not belong together.
    """
    total = hidden.shape[0]
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: choose at least 1")
    if hidden.dim() != 2 or labels.shape != (total,) or weights.shape != (total,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, weights {tuple(weights.shape)}: "
            "flatten them to [N, D], [N] and [N]"
        )
    weights = weights.detach().to(_sum_dtype(hidden))
    learned = {name: p for name, p in draft_head.named_parameters() if p.requires_grad}
    plan = _Plan(draft_head, tuple(learned), target_logits, labels, weights, objective, chunk_tokens)
    if torch.is_grad_enabled() and (hidden.requires_grad or learned):
        loss_sum, measured = _ChunkedSum.apply(plan, hidden, *learned.values())  # type: ignore[no-untyped-call]
    else:
        loss_sum, measured = _evaluate(plan, hidden, list(learned.values()))
    return ChunkedLoss(loss_sum, weights.sum(), (measured * weights).sum(), measured)


@torch.no_grad()
def _evaluate(plan: _Plan, hidden: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum the values alone."""
    loss_sum, measured = plan.weights.new_zeros(()), plan.weights.new_zeros(hidden.shape[0])
    for rows in plan.chunks():
        loss, counts = plan.sums(hidden[rows], parameters, rows)
        loss_sum += loss
        measured[rows] = counts
    return loss_sum, measured
