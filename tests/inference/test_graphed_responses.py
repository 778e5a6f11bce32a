"""Answers by captured rounds are those of `generate_batch`: tokens, states, features and law, in any company."""

from collections import Counter
from typing import Any

import pytest
import torch

from inference.attention import use_grouped_attention
from inference.errors import InputError
from inference.generation import Response, generate_batch
from inference.graphed.engine import GraphedEngine
from inference.graphed.responses import CapturedAnswers
from inference.graphed.target import StaticTarget
from inference.lean import use_lean_layers
from inference.model import CausalModel
from inference.sampling_settings import SamplingSettings
from inference.taps import EMBEDDING
from tests.inference.families import VOCAB, family_model
from tests.inference.test_graphed import misfit, prompt, target_law

NONE: frozenset[int] = frozenset()
GREEDY = SamplingSettings()
CONTEXT = 128
LENGTHS = (1, 2, 17, 5, 70, 1, 33, 9, 64, 65, 3)


def answer_captured(
    model: CausalModel,
    prompts: list[list[int]],
    *,
    settings: SamplingSettings,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    seed: int,
    max_requests: int = 512,
    **kept: Any,
) -> list[Response]:
    """One list of prompts, in places as long as its longest request."""
    answers = CapturedAnswers(
        model,
        longest=max((len(prompt) for prompt in prompts), default=1) + max_new_tokens,
        settings=settings,
        max_requests=min(max_requests, max(1, len(prompts))),
        **kept,
    )
    return answers.answer(prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, seed=seed)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def target(request: pytest.FixtureRequest) -> CausalModel:
    return model_of(request.param)


def model_of(family: str) -> CausalModel:
    model = family_model(family, max_position_embeddings=CONTEXT)
    use_grouped_attention(model.model)
    use_lean_layers(model.model)
    return model


def prompts_of(*lengths: int) -> list[list[int]]:
    return [prompt(length, seed=number).tolist() for number, length in enumerate(lengths)]


def assert_same(given: list[Response], wanted: list[Response]) -> None:
    assert [r.tokens for r in given] == [r.tokens for r in wanted]
    assert [r.stopped for r in given] == [r.stopped for r in wanted]
    for one, other in zip(given, wanted, strict=True):
        for name, tolerance in (("states", 1e-9), ("prompt_states", 1e-9), ("features", 2**-8)):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("places", [1, 4, 99])
@pytest.mark.parametrize("keep", ["nothing", "states", "prompt states", "all"])
def test_greedy_answers_are_those_of_a_batch(target: CausalModel, keep: str, places: int) -> None:
    prompts = prompts_of(*LENGTHS)
    free = generate_batch(target, prompts, settings=GREEDY, max_new_tokens=20, stop_tokens=NONE, seed=0)
    # Tokens that end answers of any length, so that places are taken again at all times.
    stops = frozenset({free[2].tokens[3], free[4].tokens[9], free[6].tokens[0]})
    kept = {
        "settings": GREEDY,
        "stop_tokens": stops,
        "seed": 0,
        "keep_states": keep in ("states", "all"),
        "keep_prompt_states": keep in ("prompt states", "all"),
        "taps": [0, 1, EMBEDDING] if keep == "all" else [],
    }
    # The longest prompts leave less room than twenty, or a hundred, tokens.
    for tokens in (1, 2, 20, 100):
        wanted = generate_batch(target, prompts, max_new_tokens=tokens, **kept)  # type: ignore[arg-type]
        given = answer_captured(target, prompts, max_new_tokens=tokens, max_requests=places, **kept)  # type: ignore[arg-type]
        assert_same(given, wanted)
    assert {len(r.tokens) for r in wanted} != {100}


def test_one_set_of_rounds_answers_list_after_list(target: CausalModel) -> None:
    answers = CapturedAnswers(target, longest=100, settings=GREEDY, max_requests=3, keep_states=True, taps=[1])
    answers.prepare(longest_prompt=70)
    for lengths in (LENGTHS, (4, 4), (), (60, 1, 2, 3)):
        prompts = prompts_of(*lengths)
        given = answers.answer(prompts, max_new_tokens=12, stop_tokens=NONE, seed=1)
        if prompts:
            wanted = generate_batch(
                *(target, prompts),
                **{"settings": GREEDY, "max_new_tokens": 12, "stop_tokens": NONE},  # type: ignore[arg-type]
                **{"seed": 1, "keep_states": True, "taps": [1]},  # type: ignore[arg-type]
            )
            assert_same(given, wanted)
        else:
            assert given == []


def test_sampled_answers_follow_the_targets_law() -> None:
    model = model_of("llama")
    settings = SamplingSettings(temperature=0.4)
    given = answer_captured(
        model,
        [prompt(4, seed=8).tolist()] * 4000,
        settings=settings,
        max_new_tokens=2,
        stop_tokens=NONE,
        seed=3,
        max_requests=250,
    )
    assert misfit(Counter(tuple(r.tokens) for r in given), target_law(model, 0.4)) < 4.0


def test_a_sampled_answer_does_not_depend_on_the_others(target: CausalModel) -> None:
    def sampled(seed: int, places: int, count: int = 11) -> list[list[int]]:
        given = answer_captured(
            target,
            prompts_of(*LENGTHS)[:count],
            settings=SamplingSettings(temperature=0.9, top_k=20, top_p=0.9),
            max_new_tokens=15,
            stop_tokens=frozenset(range(4)),
            seed=seed,
            max_requests=places,
        )
        return [r.tokens for r in given]

    assert sampled(5, 2) == sampled(5, 7) and sampled(5, 3, count=6) == sampled(5, 7)[:6]
    assert sampled(5, 2) != sampled(6, 2)
    assert all(0 <= token < VOCAB for tokens in sampled(5, 2) for token in tokens)


def test_sampled_states_predict_the_tokens_they_stand_for(target: CausalModel) -> None:
    """With one likeliest token kept, sampling is greedy: the head's argmax of every state is its token."""
    given = answer_captured(
        target,
        prompts_of(*LENGTHS),
        settings=SamplingSettings(temperature=0.9, top_k=1),
        max_new_tokens=15,
        stop_tokens=NONE,
        seed=0,
        max_requests=4,
        keep_states=True,
    )
    for response in given:
        assert response.states is not None
        assert target.head(response.states).argmax(-1).tolist() == response.tokens


def spoilt(target: CausalModel) -> bool:
    """Whether answers are unlike those of a batch."""
    prompts = prompts_of(*LENGTHS)
    free = generate_batch(target, prompts, settings=GREEDY, max_new_tokens=20, stop_tokens=NONE, seed=0)
    # Answers of many lengths, so that places are taken again, and the last ones moved.
    stops = frozenset({free[4].tokens[9], free[6].tokens[0]})
    kept = {"settings": GREEDY, "max_new_tokens": 20, "stop_tokens": stops, "seed": 0, "keep_states": True, "taps": [1]}
    wanted = generate_batch(target, prompts, **kept)  # type: ignore[arg-type]
    try:
        assert_same(answer_captured(target, prompts, max_requests=8, **kept), wanted)  # type: ignore[arg-type]
    except AssertionError:
        return True
    return False


def test_mutants_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    target = model_of("llama")
    assert not spoilt(target)
    with monkeypatch.context() as patch:  # copied out after the place was taken again
        admit = GraphedEngine._admit
        late: list[tuple[object, ...]] = []
        leave = CapturedAnswers._left

        def afterwards(self: GraphedEngine) -> None:
            admit(self)
            for told in late:
                leave(*told)  # type: ignore[arg-type]
            late.clear()

        patch.setattr(CapturedAnswers, "_left", lambda *told: late.append(told))
        patch.setattr(GraphedEngine, "_admit", afterwards)
        patch.setattr(GraphedEngine, "idle", property(lambda self: not self._open and not late))
        assert spoilt(target)
    with monkeypatch.context() as patch:  # kept one position too far
        run = StaticTarget.run

        def shifted(self: StaticTarget, ids, starts, rows, *, shown):  # type: ignore[no-untyped-def]
            made = run(self, ids, starts, rows, shown=shown)
            if rows is None and self.states is not None:
                self.states.copy_(self.states.roll(1, dims=1))
            return made

        patch.setattr(StaticTarget, "run", shifted)
        assert spoilt(target)
    with monkeypatch.context() as patch:  # what is kept of a request does not move with it
        move = StaticTarget.move

        def left_behind(self: StaticTarget, source: int, place: int, *, length: int) -> None:
            states, self.states = self.states, None
            move(self, source, place, length=length)
            self.states = states

        patch.setattr(StaticTarget, "move", left_behind)
        assert spoilt(target)


def test_what_cannot_be_answered_is_told(target: CausalModel) -> None:
    asked = {"max_new_tokens": 5, "stop_tokens": NONE, "seed": 0}
    with pytest.raises(ValueError, match="no repetition penalty"):
        answer_captured(target, [[1]], settings=SamplingSettings(repetition_penalty=1.2), **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tokens"):
        answer_captured(target, [[1], []], settings=GREEDY, **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="context holds"):
        answer_captured(target, [[1] * CONTEXT], settings=GREEDY, **asked)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use at least 1"):
        answer_captured(target, [[1]], settings=GREEDY, max_requests=0, **asked)  # type: ignore[arg-type]
    assert answer_captured(target, [], settings=GREEDY, **asked) == []  # type: ignore[arg-type]
    plain = family_model("llama", max_position_embeddings=CONTEXT)
    use_grouped_attention(plain.model)
    with pytest.raises(InputError, match="cannot be captured"):
        answer_captured(plain, [[1]], settings=GREEDY, **asked)  # type: ignore[arg-type]
    kinds = ["sliding_attention", "full_attention"]
    windows = family_model("qwen2", sliding_window=40, layer_types=kinds, use_sliding_window=True)
    use_grouped_attention(windows.model)
    use_lean_layers(windows.model)
    with pytest.raises(InputError, match="see 40 of 64 positions"):
        answer_captured(windows, [[1] * 40], settings=GREEDY, **asked)  # type: ignore[arg-type]
