"""The whole loop on a tiny target: what it leaves behind, what a second run does, and what stages say on their own."""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file

from inference.errors import InputError
from inference.pair import load_pair
from inference.records import tokens_digest
from pipelines import cli, config, verify
from pipelines.artifacts import Artifact
from pipelines.exports.parity import independent_gap
from pipelines.exports.write import read_exports, write_exports
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import REPOSITORY, Workplace, contents, read, records, run, token_digests


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


# What a run leaves


def test_a_run_leaves_one_complete_artifact_a_stage_and_a_published_champion(finished: Finished) -> None:
    assert finished.code == 0, finished.out
    place = finished.place
    counts = {kind: len(place.complete(kind)) for kind in ("plan", "corpus", "draft", "score", "select")}
    assert counts == {"plan": 1, "corpus": 1, "draft": 3, "score": 1, "select": 1}
    for manifest in place.artifacts.glob("*/*/manifest.json"):
        Artifact.load(manifest.parent).verify()
    assert not list(place.artifacts.glob("*/.partial-*"))
    assert [p.name for p in place.versions.iterdir() if not p.name.startswith(".")].count("v1") == 1
    assert place.champion.is_symlink() and place.champion.resolve() == (place.versions / "v1").resolve()
    [event] = [json.loads(line) for line in (place.registry / "events.jsonl").read_text().splitlines()]
    assert (event["pair"], event["alias"], event["from"], event["to"]) == ("tiny", "champion", None, "v1")
    assert event["reason"] == read(place.only("select") / "decision.json")["reason"]


def test_manifests_chain_each_stage_to_its_inputs(finished: Finished) -> None:
    place = finished.place
    corpus, score, select = (Artifact.load(place.only(kind)) for kind in ("corpus", "score", "select"))
    pruned = Artifact.load(place.draft("pruned"))
    target = corpus.manifest["inputs"]["target"]
    assert pruned.manifest["inputs"] == {"corpus": corpus.digest, "target": target}
    assert Artifact.load(place.draft("lookup")).manifest["inputs"] == {"target": target}, "not trained, so no corpus"
    assert score.manifest["inputs"]["draft/pruned"] == pruned.digest
    assert select.manifest["inputs"] == {"score": score.digest}
    pair = read(place.champion / "pair.json")
    assert pair["lineage"]["select"] == select.digest and pair["target"]["digest"] == target
    assert '"_target_"' not in (place.champion / "pair.json").read_text()


def test_the_corpus_keeps_splits_apart(finished: Finished) -> None:
    rows = [json.loads(line) for line in (finished.place.only("corpus") / "prompts.jsonl").read_text().splitlines()]
    ids: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    for row in rows:
        ids[row["split"]].append(row["prompt"]["id"])
    # 18 responses asked for, 3 of them validation (at least one a domain); 2 held-out prompts in 3 domains.
    assert {split: len(found) for split, found in ids.items()} == {"train": 15, "validation": 3, "heldout": 6}
    assert len({i for found in ids.values() for i in found}) == 24
    scored = {r["prompt_id"] for r in records(finished.place.only("score"))}
    assert scored == set(ids["heldout"])


def test_the_summary_names_decision_pair_and_report(finished: Finished) -> None:
    decision = read(finished.place.only("select") / "decision.json")
    assert f"decision  {decision['winner']}: {decision['reason']}" in finished.out
    assert f"pair      {finished.place.versions / 'v1'} (alias {finished.place.champion})" in finished.out
    assert "scorecard.md" in finished.out and "training pruned: 6 steps" in finished.out
    assert "what each stage took when it was made" in finished.out


def test_what_each_stage_took_is_kept_and_shown(finished: Finished) -> None:
    stages = read(finished.place.champion / "stages.json")
    builds = [f"build: {name}" for name in ("none", "lookup", "pruned")]
    assert list(stages) == ["plan", "corpus", *builds, "score", "select", "publish", "publish: fresh process"]
    corpus = read(finished.place.only("corpus") / "manifest.json")["took"]
    assert stages["corpus"] == corpus
    report = (finished.place.champion / "report.html").read_text()
    for stage, took in stages.items():
        assert took["seconds"] >= 0 and took["resident_bytes"] > 2**25, "torch alone holds more"
        assert f'<th scope="row">{stage}</th><td>{took["seconds"]:.1f}</td>' in report
    assert stages["publish"]["seconds"] > stages["publish: fresh process"]["seconds"]
    assert f"score {finished.place.only('score').name}: made in" in finished.out


def test_the_model_card_says_what_was_measured_and_how_to_use_it(finished: Finished) -> None:
    card = (finished.place.champion / "MODEL_CARD.md").read_text()
    decision = read(finished.place.only("select") / "decision.json")
    for words in (decision["reason"], "load_pair(", "dspark generate --pair", "| lookup |", "| pruned |"):
        assert words in card
    assert {"records.jsonl", "scorecard.json", "scorecard.md", "scorecard.png", "checks.json", "draft"} <= {
        p.name for p in finished.place.champion.iterdir()
    }


# Again, and in parts


def test_a_second_run_skips_everything_and_says_so(finished: Finished, tmp_path: Path) -> None:
    before = contents(finished.place.artifacts) | contents(finished.place.registry)
    text, code = run(finished.place.words(f"hydra.run.dir={tmp_path / 'outputs'}"))
    assert code == 0
    for kind, count in {"plan": 1, "corpus": 1, "draft": 3, "score": 1, "select": 1}.items():
        assert sum(line.startswith(f"{kind} ") and "unchanged, skipped" in line for line in text.splitlines()) == count
    assert "publish: unchanged, skipped" in text
    assert "what each stage took when it was made" in text and "build: pruned" in text
    assert contents(finished.place.artifacts) | contents(finished.place.registry) == before


def test_a_change_of_a_late_stage_leaves_the_earlier_ones_alone(finished: Finished, tmp_path: Path) -> None:
    place = copied(finished, tmp_path)
    text, code = run(place.words("select.min_alpha=0.999", stage="select"))
    assert code == 0, text
    assert len(place.complete("select")) == 2 and len(place.complete("score")) == 1


def test_each_stage_works_after_the_one_before_and_else_says_what_is_missing(
    tiny_place: Workplace, tmp_path: Path
) -> None:
    place = tiny_place.again(tmp_path / "place")
    fast = ["draft=[none]", "budget.score_prompts=1", "score.temperatures=[0.0]", "decode.max_new_tokens=4"]

    def stage(name: str) -> tuple[str, int]:
        return run(place.words(*fast, stage=name))

    text, code = stage("score")
    assert code == 2 and "no output of the corpus stage for this configuration" in text
    assert "run `dspark corpus` with the same overrides first" in text
    assert stage("corpus")[1] == 0
    text, code = stage("score")
    assert code == 2 and "no output of the build stage" in text
    assert stage("build")[1] == 0
    text, code = stage("publish")
    assert code == 2 and "no output of the score stage" in text
    assert stage("score")[1] == 0
    text, code = stage("publish")
    assert code == 2 and "no output of the select stage" in text
    assert not place.versions.exists()
    text, code = stage("select")
    assert code == 0 and "decision" in text


def test_stages_return_their_objective(finished: Finished, tmp_path: Path) -> None:
    config.register()
    place = finished.place

    def objective(stage: str) -> float:
        with initialize_config_module("conf", version_base="1.3"):
            return cli.job(compose("config", overrides=[*place.words(), f"stage={stage}"]))

    cards = read(place.only("score") / "scorecard.json")["scorecards"]
    pooled = {c["arm"]: c["speedup"]["value"] for c in cards if c["domain"] == "overall" and c["temperature"] is None}
    winner = read(place.only("select") / "decision.json")["winner"]
    assert objective("corpus") == read(place.only("corpus") / "manifest.json")["metrics"]["response_tokens"] > 0
    assert objective("build") == read(place.draft("pruned") / "manifest.json")["metrics"]["eval/acceptance"] > 0
    assert objective("score") == pytest.approx(max(pooled.values()))
    assert objective("select") == objective("all") == pytest.approx(pooled[winner])


@pytest.mark.parametrize(
    ("sweep", "new"), [("draft=none,lookup,[none,lookup]", 0), ("trainer.steps=2,3", 2)], ids=["drafts", "a number"]
)
def test_a_multirun_runs_every_job_and_ends_well(finished: Finished, tmp_path: Path, sweep: str, new: int) -> None:
    """Drafts that the workplace has already are found by every job; another number of steps is another draft."""
    place = copied(finished, tmp_path)
    text, code = run(["-m", *place.words(sweep, stage="build")])
    assert code == 0, text
    assert f"Launching {3 - new // 2} jobs locally" in text
    assert len(place.complete("draft")) == 3 + new


# The scorecard


def interval_free(rows: Sequence[dict[str, Any]], arm: str) -> dict[str, float | None]:
    """Figures of one arm from its records and the baseline's, by the definitions of the method and nothing of ours."""
    mine = [r for r in rows if r["arm"] == arm]
    base = [r for r in rows if r["arm"] == "none"]
    emitted, passes = sum(r["emitted"] for r in mine), sum(r["passes"] for r in mine)
    accepted, proposed = (sum(sum(r[key]) for r in mine) for key in ("accepted", "proposed"))
    beside = sum(sum(sum(ranks) for ranks in r["siblings"]) for r in mine)
    seconds = sum(sum(r["seconds"].values()) for r in mine)
    base_speed = sum(r["emitted"] for r in base) / sum(sum(r["seconds"].values()) for r in base)
    # expected speedup: tau * t_target(1) / (t_draft + t_verify + t_other), all but the prefill
    t_target = sum(r["seconds"]["verify"] for r in base) / sum(r["passes"] for r in base)
    t_round = (seconds - sum(r["seconds"]["prefill"] for r in mine)) / passes
    return {
        "tau": emitted / passes,
        "tau_draft": (accepted + beside) / passes,
        "alpha": accepted / proposed if proposed else None,
        "tokens_per_s": emitted / seconds,
        "speedup": emitted / seconds / base_speed,
        "expected_speedup": emitted / passes * t_target / t_round,
    }


def test_every_figure_follows_from_the_records(finished: Finished) -> None:
    folder = finished.place.only("score")
    rows = records(folder)
    cards = read(folder / "scorecard.json")["scorecards"]
    assert len(cards) == 3 * (3 + 1) * (2 + 1), "arms x (domains, overall) x (temperatures, all)"
    for card in cards:
        chosen = [
            r
            for r in rows
            if card["domain"] in ("overall", r["domain"]) and card["temperature"] in (None, r["temperature"])
        ]
        for name, expected in interval_free(chosen, card["arm"]).items():
            found = card[name] and card[name]["value"]
            assert found == (None if expected is None else pytest.approx(expected)), (card["arm"], card["domain"], name)
        assert card["requests"] == sum(r["arm"] == card["arm"] for r in chosen)


def test_intervals_are_bootstraps_over_prompts(finished: Finished) -> None:
    """Tau of `pruned`, resampled here by other code: the ends agree within the noise of 2,000 resamples."""
    import random

    folder = finished.place.only("score")
    by_prompt: dict[str, list[int]] = {}
    for r in records(folder):
        if r["arm"] == "pruned":
            sums = by_prompt.setdefault(r["prompt_id"], [0, 0])
            sums[0] += r["emitted"]
            sums[1] += r["passes"]
    draw = random.Random(1)
    values = []
    for _ in range(4000):
        chosen = draw.choices(list(by_prompt.values()), k=len(by_prompt))
        values.append(sum(e for e, _ in chosen) / sum(p for _, p in chosen))
    low, high = statistics.quantiles(values, n=40)[0], statistics.quantiles(values, n=40)[-1]
    [card] = [
        c
        for c in read(folder / "scorecard.json")["scorecards"]
        if (c["arm"], c["domain"], c["temperature"]) == ("pruned", "overall", None)
    ]
    assert card["tau"]["low"] == pytest.approx(low, rel=0.03)
    assert card["tau"]["high"] == pytest.approx(high, rel=0.03)


def test_greedy_arms_write_what_the_target_writes(finished: Finished) -> None:
    wrote = token_digests(finished.place.only("score"))
    greedy = {(prompt, arm): digest for (prompt, temperature, arm), digest in wrote.items() if temperature == 0}
    assert len(greedy) == 18
    assert all(digest == greedy[prompt, "none"] for (prompt, _), digest in greedy.items())
    assert all(r["mismatch"] is None for r in records(finished.place.only("score")))


# The published pair


def published(finished: Finished, arm: str, tmp_path: Path) -> Path:
    """A copy of the published version whose draft is that of an arm, whichever won, with that arm's checks.

    Which arm is fastest on a tiny random model is the machine's mood; what is published must work for all.
    """
    from inference.statistics import BASELINE

    folder = tmp_path / "version"
    shutil.copytree(finished.place.champion.resolve(), folder)
    shutil.rmtree(folder / "draft")
    shutil.copytree(finished.place.draft(arm) / "draft", folder / "draft")
    pair = read(folder / "pair.json")
    from pipelines.files import sha256_file

    pair["draft"] = {
        "name": arm,
        "kind": arm,
        "files": {p.name: sha256_file(p) for p in sorted((folder / "draft").iterdir())},
    }
    blocks = read(folder / "scorecard.json")["blocks"]
    pair["decoding"]["lookahead"] |= blocks[arm] if arm != BASELINE else {"tokens": 0, "siblings": []}
    (folder / "pair.json").write_text(json.dumps(pair))
    rows = [r for r in records(folder) if r["arm"] == arm][:4]
    check = read(folder / "checks.json")[0]
    lines = (finished.place.only("corpus") / "prompts.jsonl").read_text().splitlines()
    user = {p["id"]: p["turns"][0] for p in (json.loads(line)["prompt"] for line in lines)}
    checks = [
        check
        | {"arm": arm, "prompt_id": r["prompt_id"], "user": user[r["prompt_id"]]}
        | {"temperature": r["temperature"], "digest": r["digest"], "passes": r["passes"]}
        for r in rows
    ]
    (folder / "checks.json").write_text(json.dumps(checks))
    shutil.rmtree(folder / "serve")
    write_exports(folder, folder / "serve", cache=finished.place.cache)
    return folder


def test_the_published_pair_repeats_its_scored_tokens(finished: Finished) -> None:
    checks = read(finished.place.champion / "checks.json")
    assert {c["temperature"] for c in checks} == {0.0, 1.0}, "one prompt at both temperatures"
    assert verify.verify(finished.place.champion, cache=finished.place.cache) == 2


@pytest.mark.parametrize("arm", ["none", "lookup", "pruned"])
def test_a_pair_of_every_kind_repeats_its_scored_tokens(finished: Finished, tmp_path: Path, arm: str) -> None:
    folder = published(finished, arm, tmp_path)
    assert verify.verify(folder, cache=finished.place.cache) == 4
    [export] = read_exports(folder / "serve")
    assert export.layout == {"pruned": "transformers"}.get(arm, arm)
    assert {"vllm", "sglang", "transformers", "llama.cpp"} == {one.engine for one in export.engines}
    assert all(one.command and not one.refuses for one in export.engines)
    assert (export.tokens == 0) is (arm == "none")


def test_a_kind_that_no_engine_knows_is_published_without_commands(finished: Finished, tmp_path: Path) -> None:
    folder = published(finished, "lookup", tmp_path)
    (folder / "draft" / "draft.json").write_text(json.dumps({"kind": "brand_new"}))
    [export] = write_exports(folder, tmp_path / "serve", cache=finished.place.cache)
    assert [(one.command, one.refuses) for one in export.engines] == [("", "they load no brand_new drafts of our form")]


def test_gguf_without_a_converter_is_refused(finished: Finished, tmp_path: Path) -> None:
    folder = published(finished, "pruned", tmp_path)
    with pytest.raises(InputError, match=r"gguf is made from another format .*: make engines"):
        write_exports(folder, tmp_path / "serve", cache=finished.place.cache, only=["gguf"])
    assert not (tmp_path / "serve").exists()


def test_engines_that_are_here_are_measured_and_the_others_say_why_not(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(finished, "pruned", tmp_path)
    words = [
        "--engine",
        "transformers",
        "--prompts",
        "2",
        "--max-new-tokens",
        "16",
        "--out",
        str(tmp_path / "rows.json"),
    ]
    code = cli.main(["engines", str(folder), "--cache", str(finished.place.cache), *words])
    shown = capsys.readouterr().out
    rows = {row["engine"]: row for row in read(tmp_path / "rows.json")}
    assert rows["transformers"]["outcome"]["tokens"] == rows["transformers"]["ours"]["tokens"]
    assert code == (0 if rows["transformers"]["agrees"] else 1)
    assert "| transformers | vllm | not run: not asked for |" in shown
    assert "| transformers | sglang | not run: it needs a GPU |" in shown


def test_an_export_with_another_tokenizer_or_other_files_is_found(finished: Finished, tmp_path: Path) -> None:
    folder = published(finished, "pruned", tmp_path)
    exported = folder / "serve" / "transformers"
    tokenizer = read(exported / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (exported / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"file of the export was changed.*tokenizer\.json"):
        verify.verify(folder, cache=finished.place.cache)
    target = load_pair(folder, cache=finished.place.cache).target
    with pytest.raises(InputError, match="another tokenizer than the draft"):
        independent_gap(folder / "draft", exported, target, torch.arange(20))


def test_an_export_of_other_weights_is_found(finished: Finished, tmp_path: Path) -> None:
    folder = published(finished, "pruned", tmp_path)
    exported = folder / "serve" / "transformers"
    weights = load_file(exported / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    target = load_pair(folder, cache=finished.place.cache).target
    with pytest.raises(InputError, match="logits differ"):
        independent_gap(folder / "draft", exported, target, torch.arange(20))
    weights["model.norm.scale"] = weights.pop("model.norm.weight")
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="the weights lack 1 tensors"):
        independent_gap(folder / "draft", exported, target, torch.arange(20))


@pytest.mark.parametrize("policy", ["scheduled", "estimator"])
def test_a_pair_under_an_adaptive_policy_is_scored_published_and_repeats(
    finished: Finished, tmp_path: Path, policy: str
) -> None:
    place = copied(finished, tmp_path)
    text, code = run(place.words(f"lookahead={policy}", "lookahead.tokens=3", "publish.name=adaptive"))
    assert code == 0, text
    folder = place.registry / "adaptive" / "v1"
    pair = read(folder / "pair.json")
    assert pair["decoding"]["lookahead"]["kind"] == policy
    # Which draft wins on a tiny target is the machine's mood; target-only needs no measurements.
    assert pair["draft"]["name"] == "none" or pair["decoding"]["measured"]["costs"]["passes"]
    temperatures = {check["temperature"] for check in read(folder / "checks.json")}
    assert temperatures == ({0.0} if policy == "estimator" else {0.0, 1.0})
    assert verify.verify(folder, cache=place.cache) > 0


def test_a_flipped_byte_in_the_draft_is_found(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(finished, "pruned", tmp_path)
    weights = folder / "draft" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert verify.main([str(folder), "--cache", str(finished.place.cache)]) == 2
    assert capsys.readouterr().err.startswith(f"a file of the draft was changed or damaged [{weights}]")


def test_another_answer_than_the_scored_one_is_found(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(finished, "pruned", tmp_path)
    checks = read(folder / "checks.json")
    checks[-1]["digest"] = tokens_digest([1, 2, 3])
    (folder / "checks.json").write_text(json.dumps(checks))
    assert verify.main([str(folder), "--cache", str(finished.place.cache)]) == 2
    assert "gave other tokens or passes than its score" in capsys.readouterr().err


def test_three_lines_of_python_decode_with_the_pair(finished: Finished) -> None:
    pair = load_pair(str(finished.place.champion), cache=finished.place.cache)
    result = pair.generate("code abc?", max_new_tokens=8)
    assert 1 <= len(result.decoded.tokens) <= 8 and result.tau >= 1.0 and result.tokens_per_s > 0


def test_a_pair_refuses_another_target(finished: Finished, tmp_path: Path) -> None:
    from inference.errors import InputError
    from tests.pipelines.tiny import write_model

    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"this target has digest .*: use the target of the pair"):
        load_pair(finished.place.champion, target=str(other), cache=finished.place.cache)


def test_generate_streams_text_and_ends_with_tau_and_speed(finished: Finished) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "generate", "--pair", str(finished.place.champion)]
    options = ["--max-new-tokens", "8", "--cache", str(finished.place.cache), "maths why?"]
    done = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pair = load_pair(finished.place.champion, cache=finished.place.cache)
    pieces: list[str] = []
    text = pair.generate("maths why?", max_new_tokens=8, on_text=pieces.append).text
    assert len(pieces) > 1, "in pieces, not at the end"
    assert done.stdout == "".join(pieces) + "\n"
    assert text.startswith("".join(pieces))
    [line] = done.stderr.splitlines()
    assert " draft: " in line and ", tau " in line and line.endswith(" tokens/s]")


def test_a_pair_that_decodes_otherwise_is_not_published(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 1, no version."""
    place = copied(finished, tmp_path)
    shutil.rmtree(place.registry)
    refusal = subprocess.CompletedProcess([], 2, "", "chat/2-0 at temperature 0 gave other tokens than its score\n")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: refusal)
        text, code = run(place.words(stage="publish"))
    assert code == 1
    [line] = [line for line in text.splitlines() if line.startswith("dspark: ")]
    assert line.startswith("dspark: the pair did not reload from its files [") and line.endswith("than its score")
    assert "Traceback" not in text
    assert not [p for p in place.versions.iterdir() if not p.name.startswith(".")]


def copied(finished: Finished, tmp_path: Path) -> Workplace:
    """A workplace with the finished one's artifacts and registry, to change."""
    place = Workplace(tmp_path / "copy", finished.place.cache)
    shutil.copytree(finished.place.root, place.root, symlinks=True)
    return place
