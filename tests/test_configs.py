"""Every YAML file below conf/ composes, converts to typed objects and passes its own validation. None is left out."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from inference.feature_drafts import FeatureDraftConfig
from pipelines import config
from pipelines.composition import choices

CONF = Path(__file__).resolve().parent.parent / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))


def composed(*overrides: str, with_hydra: bool = False) -> DictConfig:
    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def test_no_other_kind_of_file_hides_in_conf() -> None:
    others = [path.name for path in CONF.rglob("*") if path.is_file() and path.suffix not in (".yaml", ".pyc")]
    assert sorted(others) == ["__init__.py", "py.typed"]


@pytest.mark.parametrize("name", FILES)
def test_it_composes_and_validates(name: str) -> None:
    if name == "config":
        assert isinstance(config.typed(composed()), config.RunConfig)
        return
    group, _, choice = name.rpartition("/")
    if group.startswith("hydra/"):
        hydra = composed(f"{group}={choice}", with_hydra=True).hydra
        assert hydra.runtime.choices[group] == choice
        return
    if group == "sweep":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra `sweep`")
        assert composed(f"{group}={choice}", with_hydra=True).hydra.mode.name == "MULTIRUN"
        return
    run = config.typed(composed(f"{group}={choice}"))
    if group == "experiment":
        return
    chosen = getattr(run, group)
    if group in config.NAMED:
        assert list(chosen) == [choice], "the file's package is <group>.<its own name>"
        chosen = chosen[choice]
    assert dataclasses.is_dataclass(chosen)


@pytest.mark.parametrize("group", [*config.PLUGINS])
def test_every_plug_in_has_a_file(group: str) -> None:
    if group in ("prompts", "corpus", "draft") and group not in choices():
        pytest.fail(f"conf/{group} is missing")
    kinds = {kind for package in config.PLUGINS[group] for kind in config.plugins(package)}
    config.register()
    used = {
        (value[name] if group in config.NAMED else value).kind
        for name in choices()[group]
        for value in [getattr(config.typed(composed(f"{group}={name}")), group)]
    }
    assert used == kinds


def test_the_default_takes_the_controls_and_trains_a_draft_that_reads_features() -> None:
    drafts = config.typed(composed()).draft
    assert {"none", "lookup", "quantized"} < set(drafts)
    assert any(draft.trained and isinstance(draft, FeatureDraftConfig) for draft in drafts.values())


@pytest.mark.parametrize("word", ["draft=pruned", "draft=[pruned]"])
def test_one_choice_of_a_list_may_be_written_as_a_word(word: str) -> None:
    assert list(config.typed(composed(word)).draft) == ["pruned"]
