"""What came of what, told to the run's tracker: corpus -> draft -> pair. Manifests and pair.json say the same for good.

    with tracking(context, "corpus-1a2b", {"seed": 0}) as tracker:
        tracker.log(1, {"loss": 1.5})

A tracker's files lie beside the artifacts, in `<artifacts>/tracker`: nothing that is measured depends on them, and one
`tensorboard --logdir` or `wandb sync` finds them all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.artifacts import Artifact, Spec, Work
from pipelines.context import RunContext
from pipelines.files import plain
from pipelines.provenance import redacted
from train.trackers import TrackedArtifact, Tracker, guarded, lent

FOLDER = "tracker"


@contextmanager
def tracking(context: RunContext, run_name: str, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """The run's tracker for one piece of work, closed at its end; it opens at its first use.

    Args:
        context: of the run.
        run_name: under which the tracker shows this piece.
        settings: plain data shown beside it; secrets are hidden.
    """
    built = context.cfg.tracker.build(context.store.root / FOLDER, run_name, redacted(plain(settings)))
    tracker = guarded(built)
    try:
        yield tracker
    finally:
        tracker.finish()


def obtain(
    context: RunContext,
    spec: Spec,
    *,
    name: str,
    make: Callable[[Work, Tracker], None],
    settings: Mapping[str, Any],
    uses: Sequence[TrackedArtifact] = (),
) -> Artifact:
    """The artifact of a spec; when it is made now, under a tracker that then hears what it came from.

    Args:
        context: of the run.
        spec: what it is made from.
        name: of the draft; "" for a corpus, of which a pair has one.
        make: writes it, and may give the tracker away to what closes it.
        settings: shown beside the tracker's run.
        uses: what it is made from, as the tracker knows it.
    """
    known = context.store.find(spec) is not None
    with tracking(context, "-".join(filter(None, (spec.kind, name, spec.key))), settings) as tracker:
        artifact = context.store.obtain(spec, make=lambda work: make(work, lent(tracker)))
        if not known:
            tracker.artifact(tracked(context, artifact, name), uses=uses, metadata=_metadata(artifact))
    return artifact


def tracked(context: RunContext, artifact: Artifact, name: str = "") -> TrackedArtifact:
    """A corpus (no name) or a draft as the tracker knows it: named after the pair it is for."""
    kind, pair = artifact.manifest["kind"], context.cfg.publish.name
    return TrackedArtifact(kind, f"{pair}-{name}" if name else pair, artifact.digest, artifact.path)


def publish(
    context: RunContext, version: Path, *, digest: str, uses: Sequence[TrackedArtifact], metadata: Mapping[str, Any]
) -> None:
    """Tell the tracker of a new version of the pair.

    Args:
        context: of the run.
        version: its folder.
        digest: hex SHA-256 of its `pair.json`, which holds those of its files.
        uses: the corpus and the draft it comes from.
        metadata: plain data shown beside it.
    """
    name = context.cfg.publish.name
    with tracking(context, f"pair-{name}-{version.name}", {"pair": name, "version": version.name}) as tracker:
        pair = TrackedArtifact("pair", name, digest, version)
        tracker.artifact(pair, uses=uses, metadata=redacted(plain(metadata)))


def _metadata(artifact: Artifact) -> dict[str, Any]:
    """What a manifest says that helps to find and compare: inputs, seed, metrics, code."""
    manifest = artifact.manifest
    chosen = {key: manifest[key] for key in ("inputs", "seed", "metrics")}
    plain_data: dict[str, Any] = redacted(plain({**chosen, "commit": manifest["code"]["commit"]}))
    return plain_data
