"""A registry for all tests of a module, a server that is up, and the engine alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.server.serving import Live, Own, live, settings_for, write_registry


@pytest.fixture(scope="module")
def alias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The champion of a tiny registry. Read only; tests that move it write one of their own."""
    return write_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def served(alias: Path) -> Iterator[Live]:
    """A server with four slots, for the tests of a module."""
    with live(settings_for(alias)) as here:
        yield here


@pytest.fixture(scope="module")
def own(alias: Path) -> Own:
    """The engine alone."""
    return Own(settings_for(alias))
