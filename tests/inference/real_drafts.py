"""One draft of every kind for the embedded target, written and loaded as the stages do, and untrained: losslessness may
not depend on a good draft."""

import functools
import shutil
from pathlib import Path

import torch
from filelock import FileLock

import distill
from distill.drafts import DraftContext
from distill.drafts.pruned import Config as PrunedConfig
from distill.drafts.quantized import Config as QuantizedConfig
from inference.drafters import Drafter, LoadContext, load_drafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import INNER_FOLDER
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_drafts.medusa import Config as Medusa
from inference.feature_networks import make_network
from inference.feature_networks._checkpoint import save_network
from inference.loading import load_causal_model
from inference.lookup_settings import LookupSettings
from inference.pair_files import DRAFT_FILE
from tests.inference.real import CPU, fp32_target, target_folder

# Low token ids are the most frequent merges of this tokenizer.
VOCABULARY = 12_288
FEATURE_CONFIGS: dict[str, FeatureDraftConfig] = {
    "dflash": DFlash(block=4, vocabulary=0),
    "dspark": DSpark(block=4, vocabulary=VOCABULARY),
    "eagle3": Eagle3(block=4, vocabulary=VOCABULARY),
    "medusa": Medusa(block=4, vocabulary=0),
}
SEED = Path(distill.__file__).parent / "seeds" / "smollm2-135m" / "draft"
"""The trained draft that comes with dspark, right more often than not."""
KINDS = ("lookup", "pruned", "pretrained", "quantized", *FEATURE_CONFIGS, "mixed")


def real_drafter(kind: str, shared: Path) -> Drafter:
    """The drafter of a kind, loaded once per process from a folder that is written once for all of them."""
    return _loaded(kind, shared)


@functools.cache
def _loaded(kind: str, shared: Path) -> Drafter:
    if kind == "lookup":
        return LookupDrafter(LookupSettings())
    if kind == "seed":
        return load_drafter(LoadContext(SEED, target_folder(), fp32_target(), "fp16_packed", CPU))
    folder = shared / f"draft-{kind}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            _write(kind, partial)
            partial.rename(folder)
    return load_drafter(LoadContext(folder, target_folder(), fp32_target(), "fp16_packed", CPU))


def _write(kind: str, folder: Path) -> None:
    context = DraftContext(target_folder(), folder, CPU, 30)
    if kind == "quantized":
        # 4 of 30 layers make bitsandbytes' products affordable; a test of its own runs NF4 and int8 whole.
        QuantizedConfig(format="nf4", layers=4).write(context)
    elif kind == "pruned":
        PrunedConfig(layers=4).student(context).save(folder)
    elif kind == "pretrained":
        # A checkpoint of its own with the target's tokenizer and, here, its weights: nearly every block is accepted
        # whole, so that the bonus token and the draft's own cache are exercised.
        shutil.copytree(target_folder(), folder)
        (folder / DRAFT_FILE).write_text('{"kind": "model"}', encoding="utf-8")
    elif kind == "mixed":
        _write_feature_draft(FEATURE_CONFIGS["eagle3"], folder / INNER_FOLDER)
        (folder / DRAFT_FILE).write_text('{"kind": "mixed", "longest": 4, "shortest": 2}', encoding="utf-8")
    else:
        _write_feature_draft(FEATURE_CONFIGS[kind], folder)


def _write_feature_draft(config: FeatureDraftConfig, folder: Path) -> None:
    # Packed layers hide their weights, which a network starts from: it is made for the plain model.
    target = load_causal_model(target_folder(), precision="fp32", device=CPU)
    vocabulary = torch.arange(config.vocabulary) if config.vocabulary else None
    network = make_network(config, target, vocabulary, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                # What starts at zero and waits for training would leave the input it belongs to unread.
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    save_network(network, folder)
    (folder / DRAFT_FILE).write_text('{"kind": "feature"}', encoding="utf-8")
