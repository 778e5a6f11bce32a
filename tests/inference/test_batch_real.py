"""The batch engine on the real target in fp32: the target's own greedy answers, and samples as when decoding alone."""

from pathlib import Path

import pytest

from inference.batch import BatchEngine, Handle
from inference.decoder import decode
from inference.drafters import Drafter
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.lookahead.fixed import FixedLookahead
from inference.lookup_settings import LookupSettings
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.target import stop_tokens
from tests.inference.real import DOMAINS, fp32_target, greedy_reference, prompts
from tests.inference.real_drafts import real_drafter

pytestmark = [pytest.mark.real, pytest.mark.slow]

PER_DOMAIN, NEW_TOKENS = 4, 40


def _lookup() -> Drafter:
    return LookupDrafter(LookupSettings(longest=3, shortest=1))


def _run(engine: BatchEngine) -> None:
    while not engine.idle:
        engine.step()


def test_greedy_answers_in_a_batch_are_the_targets_own(shared: Path) -> None:
    target = fp32_target()
    engine = BatchEngine(target, _lookup, FixedLookahead(4), max_requests=5)
    request = Request(settings=SamplingSettings(), max_new_tokens=NEW_TOKENS, stop_tokens=stop_tokens(target))
    handles: dict[str, list[Handle]] = {
        domain: [engine.submit(p, request, generator=TorchSource.seeded(0)) for p in prompts(domain)[:PER_DOMAIN]]
        for domain in DOMAINS
    }
    _run(engine)
    for domain, own in handles.items():
        expected = [answer[:NEW_TOKENS] for answer in greedy_reference(domain, shared)[:PER_DOMAIN]]
        assert [handle.result.tokens for handle in own] == expected, domain
    assert sum(sum(h.result.accepted) for own in handles.values() for h in own) > 20, "blocks were accepted"


@pytest.mark.parametrize("kind", ["lookup", "eagle3"])
def test_sampled_answers_in_a_batch_are_those_of_decoding_alone(kind: str, shared: Path) -> None:
    target, lookahead = fp32_target(), FixedLookahead(2, siblings=(1,))

    def make() -> Drafter:
        drafter = real_drafter(kind, shared)
        # Requests share a network's weights, each with a context of its own.
        return FeatureDrafter(drafter.network) if isinstance(drafter, FeatureDrafter) else _lookup()

    engine = BatchEngine(target, make, lookahead, max_requests=2)
    asked = [(prompts(domain)[0], 0.7 + 0.1 * seed, seed) for seed, domain in enumerate(DOMAINS)]
    handles = []
    for prompt, temperature, seed in asked:
        request = Request(settings=SamplingSettings(temperature=temperature), max_new_tokens=16)
        handles.append((engine.submit(prompt, request, generator=TorchSource.seeded(seed)), request))
    _run(engine)
    for (prompt, _, seed), (handle, request) in zip(asked, handles, strict=True):
        alone = decode(target, make(), prompt, request=request, lookahead=lookahead, generator=TorchSource.seeded(seed))
        assert handle.result.tokens == alone.tokens
