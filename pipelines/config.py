"""The whole of a run's configuration as one typed object, and its registration with Hydra.

`register` stores every schema with Hydra as `base_<kind>` in its group, `typed` turns what Hydra composed into a
`RunConfig` once, and below that nothing knows of Hydra or OmegaConf.
"""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inference.errors import InputError
from inference.plugins import plugins

if TYPE_CHECKING:
    from inference.sampling_settings import DecodeConfig
    from inference.target import TargetConfig
    from pipelines.drift.config import DriftConfig
    from pipelines.planning.config import PlanningConfig
    from pipelines.realign.config import RealignConfig
    from pipelines.stage_config import LoadConfig, PublishConfig, ScoreConfig, SelectConfig
    from train.config import TrainerConfig
else:  # Hydra takes any node here: the group's own schema checks it
    DecodeConfig = DriftConfig = LoadConfig = PlanningConfig = PublishConfig = RealignConfig = Any
    ScoreConfig = SelectConfig = TargetConfig = TrainerConfig = Any

STAGES = ("corpus", "build", "score", "select", "publish")
"""The stages of a run, in the order in which "all" runs them."""

EXTRA = ("plan", "load", "drift", "realign", "rollback")
"""What is run by name alone: all but `plan` need a run, or a published pair, that is there."""

PLUGINS: Mapping[str, tuple[str, ...]] = {
    "prompts": ("distill.prompts",),
    "corpus": ("distill.responses",),
    "draft": ("distill.drafts", "inference.feature_drafts"),
    "objective": ("distill.objectives",),
    "optimizer": ("train.optimizers",),
    "tracker": ("train.trackers",),
    "lookahead": ("inference.lookahead",),
}
"""Group of choices -> packages whose every public module is one choice, with a dataclass `Config`."""

SCHEMAS: Mapping[str, str] = {
    "target": "inference.target:TargetConfig",
    "trainer": "train.config:TrainerConfig",
    "decode": "inference.sampling_settings:DecodeConfig",
    "score": "pipelines.stage_config:ScoreConfig",
    "select": "pipelines.stage_config:SelectConfig",
    "load": "pipelines.stage_config:LoadConfig",
    "plan": "pipelines.planning.config:PlanningConfig",
    "publish": "pipelines.stage_config:PublishConfig",
    "drift": "pipelines.drift.config:DriftConfig",
    "realign": "pipelines.realign.config:RealignConfig",
}
"""Group with a single schema -> where its dataclass is."""

NAMED = ("prompts", "draft")
"""Groups of which several choices are taken at once, each under its own name."""


@dataclass
class PathsConfig:
    """Where things are kept; relative paths start at the folder `dspark` is called in, `~` is the home folder.

    Attributes:
        artifacts: outputs of the stages.
        registry: published pairs.
        cache: what can always be made again: converted models, device profiles.
    """

    artifacts: Path = Path("artifacts")
    registry: Path = Path("registry")
    cache: Path = Path("~/.cache/dspark")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            setattr(self, item.name, Path(getattr(self, item.name)).expanduser())


@dataclass
class BudgetConfig:
    """How long the stages may take; the device profile turns minutes into a plan, and explicit numbers replace it.

    Attributes:
        corpus_minutes: time to write responses.
        training_minutes: time to train all drafts that are trained, together.
        score_minutes: time to measure all candidates, together.
        responses: number of training responses (None = as many as corpus_minutes allow).
        score_prompts: held-out prompts of each domain to score on (None = as many as score_minutes allow).
    """

    corpus_minutes: float = 3.5
    training_minutes: float = 4.5
    score_minutes: float = 5.0
    responses: int | None = None
    score_prompts: int | None = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None and not value > 0:
                raise ValueError(f"budget.{item.name} must be above 0, got {value}: raise it, or leave it out")


CORPUS_SHARING = ("auto", "data", "tensor")
DECODING = ("auto", "one", "tensor")


@dataclass
class ProcessesConfig:
    """What the processes of `dspark launch` do.

    Attributes:
        corpus: how they write it: `data` = each has a target of its own and writes its share of the shards; `tensor` =
            the target is spread over them, where it can be; `auto` = data, unless `target.spread_teacher` says that the
            target is too large for one device, or its weights would take more than 60 % of one.
        decode: where the target lies in the other stages: `one` = whole on the first process, which decodes alone;
            `tensor` = spread over them, where it can be; `auto` = one, unless it is too large as for `corpus`.
    """

    corpus: str = "auto"
    decode: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("corpus", CORPUS_SHARING), ("decode", DECODING)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"processes.{name} is {value!r}; use one of {', '.join(choices)}")


@dataclass
class RunConfig:
    """Everything a run is made from.

    Attributes:
        target: the model to speed up.
        prompts: prompt sources by name.
        corpus: who writes the responses.
        draft: candidate drafts by name.
        objective: what training minimises.
        optimizer: how parameters move.
        trainer: length, precision and checkpoints of training.
        decode: temperature, filters and length of decoding.
        lookahead: how many proposed tokens are verified in a round.
        score: what is measured.
        select: limits and tie rules.
        load: which loads are put on the batch engine.
        plan: machines, corpus and target that `dspark plan` assumes.
        publish: name and contents of the published pair.
        drift: what counts as drift, and where traffic is logged.
        realign: what a re-alignment may spend, and when it promotes.
        tracker: where training curves go.
        budget: minutes, or explicit numbers.
        processes: what several processes of one run do.
        paths: where things are kept.
        seed: seed of everything random, at least 0.
        stage: one of `STAGES` or `EXTRA`, or "all".
    """

    target: TargetConfig = MISSING
    prompts: dict[str, Any] = field(default_factory=dict)
    corpus: Any = MISSING
    draft: dict[str, Any] = field(default_factory=dict)
    objective: Any = MISSING
    optimizer: Any = MISSING
    trainer: TrainerConfig = MISSING
    decode: DecodeConfig = MISSING
    lookahead: Any = MISSING
    score: ScoreConfig = MISSING
    select: SelectConfig = MISSING
    load: LoadConfig = MISSING
    plan: PlanningConfig = MISSING
    publish: PublishConfig = MISSING
    drift: DriftConfig = MISSING
    realign: RealignConfig = MISSING
    tracker: Any = MISSING
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = 0
    stage: str = "all"

    def __post_init__(self) -> None:
        if self.stage not in ("all", *STAGES, *EXTRA):
            raise ValueError(f"stage must be all or one of {', '.join((*STAGES, *EXTRA))}, got {self.stage!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for group in NAMED:
            chosen: dict[str, Any] = getattr(self, group)
            if not chosen:
                raise ValueError(f"{group} is empty: choose at least one, as in {group}=[name]")
            for name, value in chosen.items():
                if not dataclasses.is_dataclass(value):
                    raise ValueError(f"{group}.{name} was never chosen: add {name} to {group}=[...] to configure it")
        for group in (*PLUGINS, *SCHEMAS):
            if group not in NAMED and not dataclasses.is_dataclass(getattr(self, group)):
                raise ValueError(f"{group} holds no choice, got {getattr(self, group)!r}: write {group}=<name>")


def register(*, groups: Mapping[str, tuple[str, ...]] = PLUGINS, schemas: Mapping[str, str] = SCHEMAS) -> None:
    """Store every schema with Hydra: `base_run` at the root, `base_<kind>` in each group of plug-ins, `base_<group>` in
    each group with a single schema. Imports every plug-in, none of which imports torch.

    Args:
        groups: group -> plug-in packages.
        schemas: group -> "module:Class".

    Raises:
        TypeError: a plug-in without a dataclass `Config` whose `kind` defaults to the module's name.
    """
    store = ConfigStore.instance()
    store.store(name="base_run", node=RunConfig)
    for group, packages in groups.items():
        for kind, module in (pair for package in packages for pair in plugins(package).items()):
            schema = getattr(module, "Config", None)
            if not dataclasses.is_dataclass(schema) or getattr(schema, "kind", None) != kind:
                raise TypeError(
                    f"{module.__name__} must define a dataclass Config whose first field is kind: str = {kind!r}"
                )
            store.store(group=group, name=f"base_{kind}", node=schema)
    for group, place in schemas.items():
        name, _, member = place.partition(":")
        store.store(group=group, name=f"base_{group}", node=getattr(importlib.import_module(name), member))
    store.store(group="hydra/callbacks", name="trials", node={"trials": {"_target_": "pipelines.sweeps.Trials"}})
    register_resolvers()


def register_resolvers() -> None:
    """Let configurations say `${process_id:}`, the same for all jobs of a sweep, and `${package_file:package/name}`."""
    OmegaConf.register_new_resolver("process_id", os.getpid, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("package_file", _package_file, replace=True)


def _package_file(place: str) -> str:
    """Path of what a package of ours carries, as in `distill/seeds/x`, whether or not it is there."""
    package, _, inside = place.partition("/")
    return str(files(package).joinpath(inside))


def typed(cfg: DictConfig) -> RunConfig:
    """Convert what Hydra composed into typed objects, validating them: done once, at the edge.

    Raises:
        InputError: a value is missing, of another type or out of range.
    """
    try:
        run = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).splitlines()[0]
        where = str(error.full_key or "configuration")
        raise InputError(reason, where=where, mend="dspark --cfg job shows the whole configuration") from error
    except (ValueError, TypeError) as error:
        raise InputError(str(error), where="configuration") from error
    if not isinstance(run, RunConfig):
        raise InputError(
            "the primary config does not use our schema",
            where="configuration",
            mend="start its defaults list with base_run",
        )
    return run
