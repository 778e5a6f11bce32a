"""Jobs in engines: what they are told, what is made of their answers, and what goes wrong with them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference.errors import InputError
from inference.loading import load_causal_model
from pipelines.engines import in_llama_cpp, in_transformers, in_vllm, ours, vllm_program
from pipelines.engines.compare import Row, table
from pipelines.engines.job import Job, Outcome, Place
from tests.pipelines.tiny import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and a draft that is the target with one layer fewer: some of what it says stands, some does not."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "target")
    draft = write_model(root / "draft")
    model = load_causal_model(draft, precision="fp32", device=CPU, kept_layers=[0, 1])
    model.model.save_pretrained(draft)
    (draft / "draft.json").write_text(json.dumps({"kind": "model"}), encoding="utf-8")
    return root


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "python", tmp_path / "llama.cpp", tmp_path)


def job_for(models: Path, **changes: object) -> Job:
    prompts = [[5, 9, 30, 41], [7, 7, 100], [65, 66, 67, 68, 69]]
    job = Job(str(models / "target"), "transformers", str(models / "draft"), 3, prompts, 24)
    return replace(job, **changes)  # type: ignore[arg-type]


def outcome(**changes: object) -> Outcome:
    # 4 rounds of 3 proposals, 6 of the 12 stood: 1 + 6 / 4 tokens a round.
    whole = Outcome("some 1.0", [[1, 2], [3]], [0.5, 1.0], rounds=4, proposed=12, accepted=6, accepted_at=[3, 2, 1])
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_transformers_accepts_what_our_decoder_accepts(models: Path, place: Place) -> None:
    job = job_for(models)
    target = load_causal_model(models / "target", precision="fp32", device=CPU)
    mine = ours.run(job, target, ours.load_draft(models / "draft", target, tokens=3))
    theirs = in_transformers.run(job, place)
    assert theirs.tokens == mine.tokens
    assert 1.0 < (mine.mean_acceptance_length or 0) < 4.0
    # transformers proposes in the last round too, where ours knows that nothing more is wanted.
    assert Row("transformers", "transformers", theirs, None, mine).ratio == pytest.approx(1.0, abs=0.1)


def test_proposing_the_likeliest_tokens_changes_no_greedy_answer_and_draws_nothing(models: Path) -> None:
    target = load_causal_model(models / "target", precision="fp32", device=CPU)
    drafter = ours.load_draft(models / "draft", target, tokens=3)
    likeliest = ours.as_engines_draft(drafter, sampled=False)
    job = job_for(models)
    greedy = ours.run(job, target, likeliest)
    plain = ours.run(job, target, drafter)
    assert (greedy.tokens, greedy.accepted_at) == (plain.tokens, plain.accepted_at)
    sampled = ours.run(replace(job, temperature=1.0, max_tokens=60), target, likeliest)
    drawn = ours.run(replace(job, temperature=1.0, max_tokens=60), target, drafter)
    # A tiny random model is far from sure of anything: what is drawn from its rows overlaps more than its first choice.
    assert 0 < sampled.accepted < drawn.accepted


def test_target_only_decoding_has_no_rounds(models: Path, place: Place) -> None:
    alone = in_transformers.run(job_for(models, layout="", draft="", tokens=0), place)
    assert alone.mean_acceptance_length is None and alone.rounds == 0 and alone.tokens_per_s > 0


def test_look_up_runs_in_transformers_without_files(models: Path, place: Place) -> None:
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2]]
    job = job_for(models, layout="lookup", draft="", prompts=prompts, settings={"longest": 3, "shortest": 2})
    alone = in_transformers.run(replace(job, layout="", tokens=0), place)
    assert in_transformers.run(job, place).tokens == alone.tokens


def test_figures_follow_from_the_counts() -> None:
    assert outcome().mean_acceptance_length == 2.5
    assert outcome().tokens_per_s == 2.0
    assert outcome().same_answers(outcome(tokens=[[1, 2], [4]])) == 1


@pytest.mark.parametrize(("accepted", "agrees"), [(6, True), (5, False), (7, False)])
def test_five_per_cent_decide(accepted: int, agrees: bool) -> None:
    # 1 + 5/4 = 2.25 and 1 + 7/4 = 2.75 are ten per cent off 2.5.
    assert Row("eagle3", "vllm", outcome(accepted=accepted), None, outcome()).agrees is agrees


def test_the_table_shows_what_ran_and_why_the_rest_did_not() -> None:
    rows = [
        Row("eagle3", "vllm", outcome(engine="vllm 9"), outcome(seconds=[1.0, 2.0]), outcome()),
        Row("dspark", "sglang", None, None, outcome(), "it needs a GPU"),
    ]
    text = table(rows)
    assert "| eagle3 | vllm 9 | yes | 2.500 | 1.000 | 2 of 2 | 2.0 | 2.00x |" in text
    assert "| dspark | sglang | not run: it needs a GPU | - | - | - | - | - |" in text


@pytest.mark.parametrize(
    ("layout", "temperature", "expected"),
    [
        ("eagle3_speculators", 0.0, {"method": "eagle3", "num_speculative_tokens": 3, "model": "/draft"}),
        ("transformers", 0.0, {"method": "draft_model", "num_speculative_tokens": 3, "model": "/draft"}),
        ("eagle3", 1.0, {"method": "eagle3", "num_speculative_tokens": 3, "model": "/draft"}),
    ],
)
def test_vllm_is_told_the_method_of_a_format(layout: str, temperature: float, expected: dict[str, object]) -> None:
    job = Job("/target", layout, "/draft", 3, [[1]], 8, temperature=temperature)
    assert vllm_program.speculative(job.to_json()) == expected


def test_vllm_is_told_the_lengths_of_a_look_up() -> None:
    job = Job("/target", "lookup", "", 5, [[1]], 8, settings={"longest": 4, "shortest": 2})
    wanted = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    assert vllm_program.speculative(job.to_json()) == wanted


def test_target_only_decoding_has_no_speculative_settings() -> None:
    assert vllm_program.speculative(Job("/target", "", "", 0, [[1]], 8).to_json()) is None


def test_engines_that_are_not_there_are_one_line(models: Path, place: Place) -> None:
    with pytest.raises(InputError, match=r"no environment for engines .*: make engines"):
        in_vllm.run(job_for(models), place)
    with pytest.raises(InputError, match=r"llama\.cpp is not built .*: make engines"):
        in_llama_cpp.run(job_for(models), place)


def test_what_vllm_says_last_is_passed_on(models: Path, place: Place) -> None:
    place.python.write_text("#!/bin/sh\necho 'ValueError: no such method' >&2\nexit 1\n", encoding="utf-8")
    place.python.chmod(0o755)
    with pytest.raises(InputError, match="vLLM failed: ValueError: no such method"):
        in_vllm.run(job_for(models), place)


def test_a_server_that_does_not_start_is_one_line(models: Path, place: Place) -> None:
    server = place.llama_cpp / "build" / "bin" / "llama-server"
    server.parent.mkdir(parents=True)
    server.write_text("#!/bin/sh\necho 'error: unknown draft type'\nexit 3\n", encoding="utf-8")
    server.chmod(0o755)
    for name in ("target", "draft"):
        (place.work / f"{models.name}-{name}.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="llama-server did not start: error: unknown draft type"):
        in_llama_cpp.run(job_for(models), place)


def test_a_conversion_that_fails_leaves_nothing(models: Path, place: Place) -> None:
    place.python.write_text("#!/bin/sh\necho 'KeyError: architectures' >&2\nexit 1\n", encoding="utf-8")
    place.python.chmod(0o755)
    with pytest.raises(InputError, match="converter failed: KeyError: architectures"):
        in_llama_cpp.converted(models / "target", place)
    assert not list(place.work.glob("*.gguf"))


@pytest.mark.parametrize("layout", ["dspark", "dspark_specforge", "dspark_speculators"])
def test_dspark_is_not_asked_of_vllm_here(layout: str) -> None:
    assert "needs Triton" in in_vllm.refuses(layout)
