"""One whole run of the tiny workplace, shared by all tests of a process: the machine is measured once."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.pipelines.tiny import Workplace, run


@dataclass(frozen=True)
class Finished:
    """A workplace after a run.

    Attributes:
        place: where.
        code: exit code.
        out: what the run printed, progress and summary.
    """

    place: Workplace
    code: int
    out: str


@pytest.fixture(scope="session")
def tiny_place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Target and prompts; nothing has run yet, and tests leave it so (`Workplace.again` gives outputs of one's own)."""
    return Workplace.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny_place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A workplace in which `dspark` has run once, all stages. Read only."""
    place = tiny_place.again(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        out, code = run(place.words())
    return Finished(place, code, out)


@pytest.fixture(autouse=True)
def closed_logs() -> Iterator[None]:
    """Close the log file that Hydra opened for the last run of a test and leaves to the end of the process."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.FileHandler]:
        root.removeHandler(handler)
        handler.close()
