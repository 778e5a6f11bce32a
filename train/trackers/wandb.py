"""Weights & Biases. Offline unless told otherwise: nothing leaves the machine until `wandb sync` or mode=online.

What is made becomes an artifact of type corpus, draft or pair, with its digest as an alias; its folder is named and not
uploaded, unless upload=true. Online, what it was made from becomes the run's input. Offline there is no server to ask:
the inputs stand in the artifact's metadata and in its one small file, as they do online too.
Command line, host name, packages and code are not recorded: they can hold secrets, and manifests have what is needed.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from train.trackers import Fuse, GuardedTracker, TrackedArtifact, Tracker, within

_LOG = logging.getLogger(__name__)

MODES = ("offline", "online", "disabled")
LINEAGE_FILE = "lineage.json"
"""The one small file of every artifact: names, digests and folders of what was made and of what it was made from."""


class WandbTracker:
    """One wandb run.

    Args:
        run: what `wandb.init` returned.
        folder: for the small files of artifacts.
        online: whether there is a server that knows other runs' artifacts.
        upload: whether an artifact's files are uploaded, or only referred to.
        timeout_s: seconds to wait for an answer of the server.
    """

    def __init__(self, run: Any, *, folder: Path, online: bool, upload: bool, timeout_s: float) -> None:
        self._run, self._folder = run, folder
        self._online, self._upload, self._timeout_s = online, upload, timeout_s

    def log(self, step: int, metrics: dict[str, float], /) -> None:
        """Record metrics of a step."""
        self._run.log(metrics, step=step)

    def artifact(
        self, made: TrackedArtifact, /, *, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
    ) -> None:
        """Log the artifact, and name the run's inputs where there is a server."""
        if self._online:
            within(self._timeout_s, lambda: self._log(made, uses, metadata))
        else:
            self._log(made, uses, metadata)

    def finish(self) -> None:
        """Close the run."""
        self._run.finish()

    def _log(self, made: TrackedArtifact, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]) -> None:
        from wandb import Artifact

        for used in uses if self._online else ():
            self._use(used)
        described = {**_described(made), "uses": [_described(used) for used in uses], **metadata}
        artifact = Artifact(_name(made), type=made.kind, metadata=described)
        # wandb tells versions apart by their files. A reference to a folder would make it read and hash all of it.
        file = self._folder / f"{_name(made)}-{made.digest[:16]}.json"
        file.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        artifact.add_file(str(file), name=LINEAGE_FILE, policy="immutable", skip_cache=True)
        if made.folder is not None and self._upload:
            artifact.add_dir(str(made.folder), name="files", policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", made.digest])

    def _use(self, used: TrackedArtifact) -> None:
        """Make an artifact the run's input; one that was never sent to this server stays a line of metadata."""
        from wandb.errors import CommError

        try:
            self._run.use_artifact(f"{_name(used)}:{used.digest}", type=used.kind)
        except (CommError, ValueError):
            _LOG.info("wandb does not know %s %s: its digest is in the metadata", used.kind, used.name)


def _name(item: TrackedArtifact) -> str:
    return f"{item.kind}-{item.name}"


def _described(item: TrackedArtifact) -> dict[str, str]:
    folder = {"folder": str(item.folder.resolve())} if item.folder else {}
    return {"kind": item.kind, "name": item.name, "digest": item.digest, **folder}


@dataclass
class Config:
    """Options of wandb.

    Attributes:
        kind: name of this plug-in.
        mode: "offline" (files under the run's folder), "online" (needs an account and a network) or "disabled".
        project: project the run belongs to.
        entity: team or user ("" = wandb's default).
        upload: whether the files of corpora, drafts and pairs are uploaded, weights and all (offline: at `wandb sync`).
        timeout_s: seconds to wait for the server at the start, for an artifact and at the end, each; then the run goes
            on without it.
    """

    kind: str = "wandb"
    mode: str = "offline"
    project: str = "dspark"
    entity: str = ""
    upload: bool = False
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tracker wandb: mode is {self.mode!r}: choose one of {', '.join(MODES)}")
        if not self.timeout_s > 0:
            raise ValueError(f"tracker wandb: timeout_s is {self.timeout_s:g}: choose a number above 0")
        self._fuse = Fuse()

    def build(self, folder: Path, run_name: str, config: dict[str, Any]) -> Tracker:
        """Return the tracker; the run opens at the first metric.

        Args:
            folder: wandb writes below it.
            run_name: name shown for the run.
            config: plain settings shown beside it.
        """
        return GuardedTracker(lambda: self._open(folder, run_name, config), fuse=self._fuse)

    def _open(self, folder: Path, run_name: str, config: dict[str, Any]) -> WandbTracker:
        run = self._start(folder, run_name, config)
        online = self.mode == "online"
        return WandbTracker(run, folder=folder, online=online, upload=self.upload, timeout_s=self.timeout_s)

    def _start(self, folder: Path, run_name: str, config: dict[str, Any]) -> Any:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        # The id follows from name and settings, so a run that was killed and resumed stays one run.
        identity = json.dumps([run_name, config], sort_keys=True, default=str)
        return wandb.init(
            project=self.project,
            entity=self.entity or None,
            name=run_name,
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            resume="allow" if self.mode == "online" else None,
            dir=str(folder),
            mode=cast(Literal["offline", "online", "disabled"], self.mode),
            config=config,
            reinit="finish_previous",
            settings=self._settings(),
        )

    def _settings(self) -> Any:
        """Quiet, bounded in time, and without what could carry a secret: the command line above all."""
        import wandb

        return wandb.Settings(
            silent=True,
            console="off",
            host="hidden",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=self.timeout_s,
            login_timeout=self.timeout_s,
            finish_timeout=self.timeout_s,
            finish_timeout_raises=True,
        )
