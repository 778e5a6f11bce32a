"""Why training stopped, in one line: what, where, and how to mend it. Programming errors keep their tracebacks."""

from collections.abc import Sequence
from pathlib import Path


class TrainingError(RuntimeError):
    """Training cannot start or go on.

    Args:
        what: what is wrong, with the value that was found.
        where: the file, step or setting concerned.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        place = f" [{where}]" if where else ""
        remedy = f": {mend}" if mend else ""
        super().__init__(" ".join(f"{what}{place}{remedy}".split()))


class TrainingDiverged(TrainingError):
    """A loss or a gradient became NaN or infinite; the weights were not touched by that step.

    Args:
        what: the quantity and its value, such as "loss is nan".
        step: the step that failed, counted from 1.
        digests: digests of the micro-batches concerned (see `train.batches.batch_digest`).
        checkpoint: the last good checkpoint, if there is one.
    """

    def __init__(self, what: str, *, step: int, digests: Sequence[str], checkpoint: Path | None) -> None:
        self.step, self.digests, self.checkpoint = step, tuple(digests), checkpoint
        last = f"last good checkpoint {checkpoint}" if checkpoint else "no checkpoint yet"
        super().__init__(
            what,
            where=f"step {step}, batch digest {', '.join(digests)}, {last}",
            mend="lower optimizer.lr, set trainer.clip_norm or look at the batch; a rerun resumes from the checkpoint",
        )
