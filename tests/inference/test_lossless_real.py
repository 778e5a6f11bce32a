"""Losslessness on the real target: fp32 greedy output token for token, and the law of three sampled tokens."""

import functools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy import stats

from distill.drafts import DraftContext
from distill.drafts.pruned import Config as PrunedConfig
from distill.drafts.quantized import Config as QuantizedConfig
from inference import verification
from inference.cache import RollbackCache
from inference.decoder import Decoded, Request, decode
from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.lookup import LookupDrafter, LookupSettings
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.lookahead.fixed import FixedLookahead
from inference.model import CausalModel
from inference.randomness import TorchSource
from inference.sampling import SamplingSettings, token_probs
from inference.target import stop_tokens
from tests.inference.real import CPU, DOMAINS, TOKENS, fp32_target, greedy_reference, prompts, target_folder

pytestmark = [pytest.mark.real, pytest.mark.slow]

# One draft of every kind. The quantized one (NF4) keeps 4 of 30 layers here, which makes the bitsandbytes products
# affordable 24 times 128 tokens; `test_full_depth...` runs NF4 and int8 whole. Low acceptance gets short blocks.
BLOCKS = {"lookup": 5, "pruned": 2, "pretrained": 8, "quantized": 2}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@functools.cache
def _folders(base: Path) -> dict[str, Path]:
    """Draft folders as the build stage writes them, untrained: losslessness may not depend on a good draft."""
    folders = {kind: base / kind for kind in BLOCKS if kind != "lookup"}
    QuantizedConfig(format="nf4", layers=4).write(DraftContext(target_folder(), folders["quantized"], CPU, 30))
    PrunedConfig(layers=4).student(DraftContext(target_folder(), base, CPU, 30)).save(folders["pruned"])
    # A checkpoint of its own with the target's tokenizer and, here, its weights: nearly every block is accepted whole,
    # so that the bonus token and the draft's own cache are exercised.
    shutil.copytree(target_folder(), folders["pretrained"])
    (folders["pretrained"] / "draft.json").write_text('{"kind": "model"}', encoding="utf-8")
    return folders


def _drafter(kind: str, base: Path) -> Drafter:
    if kind == "lookup":
        return LookupDrafter(LookupSettings())
    return load_drafter(LoadContext(_folders(base)[kind], target_folder(), fp32_target(), "fp16_packed", CPU))


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Drafter]:
    """Drafters by kind, loaded once per module."""
    base = tmp_path_factory.mktemp("drafts")
    return functools.cache(lambda kind: _drafter(kind, base))


def _greedy(drafter: Drafter, prompt: torch.Tensor, *, block: int, tokens: int = TOKENS) -> Decoded:
    target = fp32_target()
    return decode(
        target,
        drafter,
        prompt,
        request=Request(settings=SamplingSettings(), max_new_tokens=tokens, stop_tokens=stop_tokens(target)),
        lookahead=FixedLookahead(block),
        generator=TorchSource.seeded(0),
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_greedy_output_equals_target_only_output(
    kind: str, domain: str, drafter: Callable[[str], Drafter], shared: Path
) -> None:
    # 8 prompts of each of 3 domains: 24 prompts x 128 tokens for every kind of draft.
    for prompt, expected in zip(prompts(domain), greedy_reference(domain, shared), strict=True):
        result = _greedy(drafter(kind), prompt, block=BLOCKS[kind])
        assert result.tokens == expected
        assert result.passes <= len(expected)


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_full_depth_quantized_drafts_keep_greedy_output(weights: str, tmp_path: Path, shared: Path) -> None:
    QuantizedConfig(format=weights).write(DraftContext(target_folder(), tmp_path, CPU, 30))
    drafter = load_drafter(LoadContext(tmp_path, target_folder(), fp32_target(), "fp32", CPU))
    accepted = proposed = 0
    for domain in DOMAINS:
        result = _greedy(drafter, prompts(domain)[0], block=3, tokens=40)
        assert result.tokens == greedy_reference(domain, shared)[0][:40]
        accepted, proposed = accepted + sum(result.accepted), proposed + sum(result.proposed)
    # The target's own weights in 4 or 8 bits agree with it most of the time; an unrelated draft would not.
    assert accepted / proposed > 0.5


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_by_one_target_only_output_equals_the_batched_reference(domain: str, shared: Path) -> None:
    assert _greedy(NoDrafter(), prompts(domain)[0], block=0).tokens == greedy_reference(domain, shared)[0]


def test_mutant_cache_not_rolled_back_changes_greedy_output(
    drafter: Callable[[str], Drafter], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback = RollbackCache.rollback
    monkeypatch.setattr(RollbackCache, "rollback", lambda self, n: rollback(self, n) if n == 0 else None)
    assert _greedy(drafter("pruned"), prompts("chat")[0], block=2).tokens != greedy_reference("chat", shared)[0]


# The sampled law. Top-k keeps the number of outcomes small enough to test, and repeated passes repeat their result, so
# every distinct pass is computed once: the decoder, its verification and both caches run as they always do.
SAMPLES = 4_000
SAMPLED = SamplingSettings(temperature=1.0, top_k=4)
LENGTH = 3
SIGNIFICANCE = 1e-4


class _PrefixCache:
    """The tokens a cache would hold."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def rollback(self, length: int) -> None:
        del self.tokens[length:]

    def nbytes(self) -> int:
        return 0


class _RememberedPasses(CausalModel):
    """A model that computes each distinct pass once, with a real rollback cache that is brought to the prefix first."""

    def __init__(self, inner: CausalModel) -> None:
        super().__init__(inner.model, folder=inner.folder, precision=inner.precision)
        self.inner, self.real, self.held = inner, inner.new_cache(), list[int]()
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    def new_cache(self) -> _PrefixCache:  # type: ignore[override]
        return _PrefixCache()

    def logits(self, tokens: torch.Tensor, cache: _PrefixCache, *, num_rows: int) -> torch.Tensor:  # type: ignore[override]
        cache.tokens += tokens.tolist()
        key = (*cache.tokens, -num_rows)
        if key not in self.known:
            self.known[key] = self._compute(cache.tokens, num_rows)
        return self.known[key]

    def _compute(self, tokens: list[int], num_rows: int) -> torch.Tensor:
        shared = next((i for i, (a, b) in enumerate(zip(self.held, tokens, strict=False)) if a != b), len(self.held))
        shared = min(shared, len(tokens) - num_rows)
        self.real.rollback(shared)
        self.held = list(tokens)
        return self.inner.logits(torch.tensor(tokens[shared:]), self.real, num_rows=num_rows).clone()


def _target_law(target: CausalModel, prompt: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Exact law of the first three tokens, from the target's own rows."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for prefix, probability in law.items():
            tokens = torch.cat([prompt, torch.tensor(prefix, dtype=torch.long)])
            logits = target.logits(tokens, target.new_cache(), num_rows=1)
            row = token_probs(logits, context=tokens, block=tokens[:0], settings=SAMPLED)[0]
            for token in row.nonzero()[:, 0].tolist():
                longer[(*prefix, token)] = probability * float(row[token])
        law = longer
    return law


def _chi_squared(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """p-value of the counts under the law; outcomes expected fewer than five times share one cell."""
    total = sum(counts.values())
    assert not set(counts) - set(law), "an output that the target never writes"
    large = [o for o, p in law.items() if p * total >= 5.0]
    observed = [counts[o] for o in large] + [total - sum(counts[o] for o in large)]
    expected = [law[o] * total for o in large]
    expected.append(total - sum(expected))
    if expected[-1] < 5.0:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return float(stats.chisquare(observed, expected).pvalue)


def _sampled_counts(target: CausalModel, drafter: Drafter, prompt: torch.Tensor) -> Counter[tuple[int, ...]]:
    request = Request(settings=SAMPLED, max_new_tokens=LENGTH)
    return Counter(
        tuple(
            decode(
                target,
                drafter,
                prompt,
                request=request,
                lookahead=FixedLookahead(2),
                generator=TorchSource.seeded(seed),
            ).tokens
        )
        for seed in range(SAMPLES)
    )


class _Flattened(_RememberedPasses):
    """The target at half its logits: a draft that often agrees and often does not, so that a wrong residual shows."""

    def logits(self, tokens: torch.Tensor, cache: _PrefixCache, *, num_rows: int) -> torch.Tensor:  # type: ignore[override]
        return 0.5 * super().logits(tokens, cache, num_rows=num_rows)


def _remembering(drafter: Drafter) -> Drafter:
    return ModelDrafter(_RememberedPasses(drafter.model)) if isinstance(drafter, ModelDrafter) else drafter


@pytest.mark.timeout(900)
def test_first_three_sampled_tokens_follow_the_targets_law(drafter: Callable[[str], Drafter]) -> None:
    prompt = prompts("chat")[1]
    target = _RememberedPasses(fp32_target())
    law = _target_law(fp32_target(), prompt)
    candidates = {kind: _remembering(drafter(kind)) for kind in ("lookup", "pruned", "quantized")}
    candidates["flattened target"] = ModelDrafter(_Flattened(fp32_target()))
    values = {
        name: _chi_squared(_sampled_counts(target, candidate, prompt), law) for name, candidate in candidates.items()
    }
    # Holm: the smallest p-value is held to the strictest level.
    for rank, value in enumerate(sorted(values.values())):
        assert value > SIGNIFICANCE / (len(values) - rank), values


def test_mutant_residual_is_caught_by_the_sampled_law(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts("chat")[1]
    monkeypatch.setattr(verification, "residual_probs", lambda p, q, token: p)
    drafter = ModelDrafter(_Flattened(fp32_target()))
    counts = _sampled_counts(_RememberedPasses(fp32_target()), drafter, prompt)
    assert _chi_squared(counts, _target_law(fp32_target(), prompt)) < SIGNIFICANCE
