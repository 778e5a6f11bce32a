"""Why acceptance fell is asked by the rounds that the published figures come from."""

from pathlib import Path
from typing import Any

import pytest

from inference.pair import load_pair
from inference.pair_files import read_pair
from inference.scoring import ScorePrompt
from inference.trees import Tree
from pipelines.realign import cause
from tests.inference.test_pair_captured import FIXED, QUESTION, made, written

TREE = Tree.of([(0,), (1,), (0, 0), (1, 0)], lookup=4)


@pytest.mark.parametrize("when_sampled", [{}, {"tree_when_sampled": True}])
def test_a_pair_with_a_tree_is_replayed_by_rounds_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when_sampled: dict[str, bool]
) -> None:
    folder = written(made(tmp_path), tmp_path, "eagle3", {**FIXED, "tree": TREE.to_json(), **when_sampled})
    pair = load_pair(folder, device="cpu", captured="on")

    def ordinary(*_: Any, **__: Any) -> None:
        raise AssertionError("its rounds are chains")

    monkeypatch.setattr(cause, "decode", ordinary)
    prompts = [ScorePrompt(text, "chat", pair.prompt_tokens(text)) for text in (QUESTION, "hi")]
    runs = cause._runs(folder, read_pair(folder), pair.target, pair.target.folder, prompts, [None, None], 20, "golden")
    for run, text in zip(runs, (QUESTION, "hi"), strict=True):
        decoded = pair.generate(text, max_new_tokens=20).decoded
        assert set(decoded.blocks) == {TREE.size}
        assert (run.emitted, run.passes) == (len(decoded.tokens), decoded.passes)
