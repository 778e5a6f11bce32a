"""On a GPU a pair goes by captured rounds by itself, with the ordinary decoder's greedy tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from inference.pair import load_pair
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.inference.test_pair_captured import (
    FIXED,
    KINDS,
    QUESTION,
    SAMPLED,
    TREE,
    drawn_by_trees,
    made,
    uncaptured,
    watched,
    written,
)

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # exact is what is asked for here
@pytest.mark.parametrize(
    ("kind", "lookahead"),
    [*((kind, FIXED) for kind in KINDS), *((kind, tree) for kind in ("eagle3", "dspark") for tree in (TREE, SAMPLED))],
)
def test_on_a_gpu_rounds_are_captured_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lookahead: dict[str, Any]
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder, ordinary = written(made(tmp_path / "models"), tmp_path, kind, lookahead), watched(monkeypatch)
    pair = load_pair(folder, device="cuda")
    for prompt, tokens in (("hi", 20), (QUESTION, 40), (QUESTION, 200), ("hi", 20)):
        pieces: list[str] = []
        given = pair.generate(prompt, max_new_tokens=tokens, on_text=pieces.append)
        assert not ordinary and "".join(pieces) == given.text
        assert given.decoded.tokens == uncaptured(pair).generate(prompt, max_new_tokens=tokens).decoded.tokens
        ordinary.clear()
    sampled = [pair.generate(QUESTION, temperature=1.0, max_new_tokens=20, seed=seed).text for seed in (3, 4, 3)]
    assert sampled[0] == sampled[2] != sampled[1] and not ordinary
    pair.generate(QUESTION, temperature=1.0, top_k=3, max_new_tokens=20)
    assert len(ordinary) == 1
    settings = SamplingSettings()
    assert pair._rounds is not None
    decoded = pair._rounds.decode(
        pair.prompt_tokens("hi"), request=Request(settings=settings, max_new_tokens=9), seed=0
    )
    assert decoded is not None and 0.0 < decoded.seconds["verify"] < decoded.total_seconds


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_on_a_gpu_sampled_answers_by_a_tree_are_the_targets_draws(tmp_path: Path, kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    pair = load_pair(written(made(tmp_path / "models"), tmp_path, kind, SAMPLED), device="cuda")
    decoded = drawn_by_trees(pair, temperature=1.0, seed=5)
    # As when nothing was captured before.
    assert drawn_by_trees(pair, temperature=1.0, seed=5).tokens == decoded.tokens


def test_on_a_gpu_a_pair_goes_by_compiled_rounds_where_that_is_asked_for(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = written(made(tmp_path / "models"), tmp_path, "eagle3", SAMPLED)
    compiled, captured = (load_pair(folder, device="cuda", captured=asked) for asked in ("compiled", "on"))
    for tokens in (20, 40):
        found, wanted = (pair.generate(QUESTION, max_new_tokens=tokens).decoded for pair in (compiled, captured))
        assert found.tokens == wanted.tokens
    texts = [compiled.generate(QUESTION, temperature=1.0, max_new_tokens=20, seed=seed).text for seed in (3, 4, 3)]
    assert texts[0] == texts[2] != texts[1]
