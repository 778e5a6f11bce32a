"""The pre-score on the embedded target: passes of greedy requests of real drafts, told without decoding."""

from pathlib import Path

import pytest

from inference.decoder import decode
from inference.drafters import ReadsFeatures
from inference.drafters.mixed import mixed_drafter
from inference.lookahead.fixed import FixedLookahead
from inference.prescore.rehearsal import Rehearses
from inference.prescore.responses import fixed_responses
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from inference.scoring import ScorePrompt
from inference.target import stop_tokens
from tests.inference.real import DOMAINS, fp32_target, prompts
from tests.inference.real_drafts import real_drafter

TOKENS, BLOCK = 48, 3


@pytest.mark.real
@pytest.mark.parametrize("kind", ["seed", "lookup", "mixed seed", "pruned"])
def test_greedy_passes_are_those_of_decoding(kind: str, shared: Path) -> None:
    target, stops = fp32_target(), stop_tokens(fp32_target())
    drafter = real_drafter("lookup" if kind == "lookup" else kind.removeprefix("mixed "), shared)
    if kind == "mixed seed":
        lookup = real_drafter("lookup", shared)
        drafter = mixed_drafter(lookup, drafter)  # type: ignore[arg-type]
    assert isinstance(drafter, Rehearses)
    asked = [ScorePrompt(domain, domain, prompts(domain)[0]) for domain in DOMAINS]
    responses = fixed_responses(
        target,
        asked,
        settings=SamplingSettings(),
        max_new_tokens=TOKENS,
        stop_tokens=stops,
        seed=0,
        taps=drafter.taps if isinstance(drafter, ReadsFeatures) else (),
    )
    request = Request(settings=SamplingSettings(), max_new_tokens=TOKENS, stop_tokens=stops)
    for prompt, response in zip(asked, responses, strict=True):
        rehearsal = drafter.rehearse(response, longest=BLOCK)
        assert rehearsal is not None
        result = decode(
            target,
            drafter,
            prompt.tokens,
            request=request,
            lookahead=FixedLookahead(BLOCK),
            generator=TorchSource.seeded(0),
        )
        assert result.tokens == response.answer.tolist()
        # Rows of half-precision weights may differ between wide and narrow passes where two tokens nearly tie.
        assert rehearsal.expected(BLOCK).passes == pytest.approx(result.passes, abs=1.0), prompt.domain
