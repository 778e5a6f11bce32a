"""A tiny target with a spare token, and drafts of every kind that can be exported."""

from pathlib import Path

import pytest
import torch

from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_networks import FeatureNetwork, make_network
from inference.loading import load_causal_model
from inference.model import CausalModel
from pipelines.exports.source import Source
from tests.pipelines.tiny import tokenizer, write_model

CPU = torch.device("cpu")
SMALL = {"block": 3, "vocabulary": 0}
SPARE = DSpark(**SMALL, taps=[1, 2], markov_rank=4, mask="token", mask_token=6)
"""For targets without a tokenizer."""
DRAFTS: dict[str, FeatureDraftConfig] = {
    "eagle3": Eagle3(**SMALL, taps=[1, 2, 3]),
    "eagle3-norms": Eagle3(**SMALL, taps=[1, 2, 3], qk_norm=True),
    "eagle3-wide": Eagle3(**SMALL, taps=[1, 2, 3], intermediate=200),
    "dflash": DFlash(**SMALL, taps=[1, 3]),
    "dflash-token": DFlash(**SMALL, taps=[1, 3], mask="token"),
    "dspark": DSpark(**SMALL, taps=[1, 2], markov_rank=4),
    "dspark-token": DSpark(**SMALL, taps=[1, 2], markov_rank=4, mask="token"),
    "dspark-gated": DSpark(**SMALL, taps=[1, 2], markov_rank=4, markov_head="gated"),
    "dspark-rnn": DSpark(**SMALL, taps=[1, 2], markov_rank=4, markov_head="rnn"),
}


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose tokenizer has a token that nothing is made of."""
    return write_model(tmp_path_factory.mktemp("target"), layers=5, vocabulary=tokenizer(extra=["<spare>"]))


@pytest.fixture(scope="session")
def target(target_folder: Path) -> CausalModel:
    return load_causal_model(target_folder, precision="fp32", device=CPU)


def draft_for(target: CausalModel, name: str, *, reduced: bool = False) -> FeatureNetwork:
    """A network in fp32 whose every part does something, with weights that bf16 holds."""
    vocabulary = torch.arange(0, target.vocab_size, 2) if reduced else None
    network = make_network(SPARE if name == "spare" else DRAFTS[name], target, vocabulary, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            moved = parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(moved.to(torch.bfloat16) if parameter.requires_grad else parameter)
    return network.eval()


def source_of(network: FeatureNetwork, target: CausalModel) -> Source:
    return Source(network, target, network.block, "tiny/target")
