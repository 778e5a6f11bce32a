"""What every stage is handed: the configuration, where artifacts live, the target's folder and digest, the plan."""

from dataclasses import dataclass
from pathlib import Path

from inference.target import target_digest
from pipelines.artifacts import Artifact, Store
from pipelines.config import RunConfig
from pipelines.plan import Plan, make_plan


@dataclass(frozen=True)
class RunContext:
    """One run.

    Attributes:
        cfg: typed configuration.
        store: artifacts.
        target_folder: the target's files.
        target_digest: of everything that decides the target's output.
        plan: responses, steps and arithmetics.
        plan_artifact: where the plan is fixed.
    """

    cfg: RunConfig
    store: Store
    target_folder: Path
    target_digest: str
    plan: Plan
    plan_artifact: Artifact

    @classmethod
    def open(cls, cfg: RunConfig) -> "RunContext":
        """Fetch the target, measure the machine where that is new, and fix the plan.

        Raises:
            InputError: the target cannot be had, or the plan cannot be made.
        """
        folder = cfg.target.folder(cfg.paths.cache)
        digest = target_digest(folder)
        store = Store(cfg.paths.artifacts)
        plan, artifact = make_plan(cfg, store, target_digest=digest)
        return cls(cfg, store, folder, digest, plan, artifact)
