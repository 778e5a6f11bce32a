"""The usual public training step of an EAGLE-3 draft, rewritten plainly in PyTorch: what ours is compared with.

It stands for the published recipe (Li et al. 2025, arXiv 2503.01840) as the public trainers run it: the whole target
runs in every step and gives logits over the whole vocabulary at every position; the draft is unrolled over every
position of the sequence, several times, each time on its own last output (training-time test); the loss is the soft
cross-entropy with the target's distribution over the draft's vocabulary; and all vocabulary-wide tensors of all
unrolled steps stay in memory until the backward pass. Not used to train anything.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

STEP_DECAY = 0.8
"""Weight of an unrolled step against the one before it."""


class PublicEagle3(nn.Module):
    """The draft: one decoder layer over `[embedding ; feature]`, with a head of its own.

    Args:
        embedding: the target's, frozen and shared.
        taps: number of target layers read.
        shape: heads, key and value heads, width of a head, width of the feed-forward part.
        vocabulary: tokens the draft can propose.
        theta: base of the rotary positions.
    """

    def __init__(
        self, embedding: nn.Module, *, taps: int, shape: tuple[int, int, int, int], vocabulary: int, theta: float
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, inner = shape
        self.theta = theta
        size = embedding.get_parameter("weight").shape[1]
        self.embedding = embedding
        self.fc = nn.Linear(taps * size, size, bias=False)
        self.embedding_norm, self.hidden_norm = nn.RMSNorm(size), nn.RMSNorm(size)
        self.query = nn.Linear(2 * size, self.heads * self.width, bias=False)
        self.key = nn.Linear(2 * size, self.kv_heads * self.width, bias=False)
        self.value = nn.Linear(2 * size, self.kv_heads * self.width, bias=False)
        self.output = nn.Linear(self.heads * self.width, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size)
        self.gate, self.up = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)
        self.norm = nn.RMSNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)

    def forward(self, tokens: Tensor, hidden: Tensor, kept: list[tuple[Tensor, Tensor]], *, seen: Tensor) -> Tensor:
        """One unrolled step at every position: the layer's output `[B, T, D]`.

        Args:
            tokens: int64 `[B, T]`, shifted to the left by one more than there were steps before.
            hidden: `[B, T, D]`, fused features in the first step, the layer's own last output after it.
            kept: keys and values of the steps so far; this step's are added.
            seen: bool `[B, 1, T, T]`, which positions a query sees in the first step's keys.
        """
        step = len(kept)
        entry = torch.cat([self.embedding_norm(self.embedding(tokens)), self.hidden_norm(hidden)], dim=-1)
        queries = self._rotated(self._split(self.query(entry), self.heads), step)
        keys = self._rotated(self._split(self.key(entry), self.kv_heads), step)
        groups = self.heads // self.kv_heads
        kept.append(
            (
                keys.repeat_interleave(groups, dim=1),
                self._split(self.value(entry), self.kv_heads).repeat_interleave(groups, dim=1),
            )
        )
        # The first step's keys are attended to causally, those of later steps at the query's own position alone.
        scale = 1.0 / math.sqrt(self.width)
        scores = (queries @ kept[0][0].transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
        later = [(queries * other).sum(-1, keepdim=True) * scale for other, _ in kept[1:]]
        weights = torch.cat([scores, *later], dim=-1).softmax(-1)
        length = tokens.shape[1]
        mixed = weights[..., :length] @ kept[0][1]
        for number, (_, values) in enumerate(kept[1:]):
            mixed = mixed + weights[..., length + number, None] * values
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
        inner = self.mlp_norm(hidden)
        result: Tensor = hidden + self.down(functional.silu(self.gate(inner)) * self.up(inner))
        return result

    def _split(self, states: Tensor, heads: int) -> Tensor:
        split: Tensor = states.unflatten(-1, (heads, self.width)).transpose(1, 2)
        return split

    def _rotated(self, states: Tensor, step: int) -> Tensor:
        """Rotary positions, one further with every step."""
        half = torch.arange(0, self.width, 2, device=states.device) / self.width
        angles = (torch.arange(states.shape[2], device=states.device) + step)[:, None] * self.theta**-half
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        first, second = states.chunk(2, dim=-1)
        rotated: Tensor = states * cos + torch.cat([-second, first], dim=-1) * sin
        return rotated


def public_loss(
    network: PublicEagle3,
    target: nn.Module,
    *,
    tokens: Tensor,
    attention: Tensor,
    mask: Tensor,
    taps: list[int],
    vocabulary: Tensor,
    unroll: int,
) -> tuple[Tensor, float]:
    """Loss of a batch, its steps weighed and summed, and the positions supervised over all steps.

    Args:
        network: in training.
        target: a transformers model, frozen.
        tokens: int64 `[B, T]`, padded on the right.
        attention: int64 `[B, T]`, 1 where a token is.
        mask: bool `[B, T]`, true where the token is the assistant's.
        taps: target layers read.
        vocabulary: int64 `[V']`, target ids that the draft can propose.
        unroll: steps.
    """
    with torch.no_grad():
        output = target(input_ids=tokens, attention_mask=attention, output_hidden_states=True, use_cache=False)
        features = torch.cat([output.hidden_states[tap + 1] for tap in taps], dim=-1)
        whole = output.logits.float()
        teacher = whole[..., vocabulary].softmax(-1)
        # Where the target's likeliest token is none of the draft's, there is nothing to learn.
        known = torch.isin(whole.argmax(-1), vocabulary)
        del whole, output
    length = tokens.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    seen = seen[None, None] & attention.bool()[:, None, None]
    # Position t reads token t + 1 + step and predicts the one after it, which the target foretold where that stands.
    ids, teacher, known = _left(tokens), _left(teacher), _left(known)
    supervised = _left(_left(mask))
    hidden, kept = network.fc(features), list[tuple[Tensor, Tensor]]()
    total, count = hidden.new_zeros(()), 0.0
    for step in range(unroll):
        hidden = network(ids, hidden, kept, seen=seen)
        logprobs = network.head(network.norm(hidden)).float().log_softmax(-1)
        learned = supervised & known
        rows = -(teacher * logprobs).sum(-1) * learned
        here = float(learned.sum())
        total = total + STEP_DECAY**step * rows.sum() / max(here, 1.0)
        count += here
        ids, teacher, known, supervised = _left(ids), _left(teacher), _left(known), _left(supervised)
    return total, count


def _left(rows: Tensor) -> Tensor:
    """Shifted by one position, `[B, T, ...]`; zeros come in at the end."""
    return torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)
