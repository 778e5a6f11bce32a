"""The model card says what was chosen, what it measured, what to do with it, and how it is decoded with."""

import re
from pathlib import Path

from pipelines.exports.write import Export, Served
from pipelines.model_card import model_card
from pipelines.version_report.contents import Contents, read_contents
from tests.pipelines.test_decisions import Made
from tests.pipelines.version_report.versions import write_version


def card(contents: Contents, **options: object) -> str:
    """The page of a version."""
    return model_card(
        contents.info,
        contents.decision,
        contents.cards,
        location="registry/my pair/v1",
        **options,  # type: ignore[arg-type]
    )


def test_the_card_has_the_figures_the_advice_and_the_candidates(tmp_path: Path) -> None:
    contents = read_contents(write_version(tmp_path))
    page = card(contents)
    assert page.startswith("# pair v1: fast draft for org/some-target\n\nChosen because: speedup ")
    assert "12 held-out prompts (24 requests). Decoding: fp32, fixed lookahead of 1.\n" in page and "Some CPU" in page
    assert re.findall("^## .*", page, flags=re.MULTILINE) == ["## Advice", "## All candidates", "## Use"]
    assert "- Over all domains: speculate at temperature 0 and 1. *(T=0: " in page
    assert "does not beat 1 |" in page, "why the other did not win"
    assert "| fast | overall | all | 24 |" in page and "| slow | overall" not in page


def test_commands_quote_the_place_and_python_spells_it(tmp_path: Path) -> None:
    page = card(read_contents(write_version(tmp_path)))
    assert "dspark serve --pair 'registry/my pair/v1'\n" in page
    assert "dspark generate --pair 'registry/my pair/v1' " in page
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert "load_pair('registry/my pair/v1')" in code


def test_engines_that_load_the_draft_are_named_and_those_that_refuse_are_not(tmp_path: Path) -> None:
    contents = read_contents(write_version(tmp_path))
    served = [Served("vllm", "vllm serve", ""), Served("sglang", "", "no such draft")]
    page = card(contents, exports=[Export("eagle3", "eagle3", 2, served)])
    assert "Other engines that load it: vllm; their commands are in `serve/README.md`." in page
    assert "Other engines" not in card(contents)


def test_a_card_of_target_only_decoding_says_not_to_speculate(tmp_path: Path) -> None:
    page = card(read_contents(write_version(tmp_path, {"slow": Made(1.5, 20.0)})))
    assert "none draft" in page and "- Do not speculate" in page


def test_only_a_draft_that_was_trained_has_learned(tmp_path: Path) -> None:
    trained = read_contents(write_version(tmp_path / "a", training={"steps": 5}))
    assert "learned from responses of the target itself" in card(trained)
    assert "learned" not in card(read_contents(write_version(tmp_path / "b")))
