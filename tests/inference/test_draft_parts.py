"""Seconds of a draft's pass by part: for drafts that read features, alone or behind look-up."""

import pytest

from inference.draft_parts import PARTS, draft_parts
from inference.drafters.feature import FeatureDrafter
from inference.drafters.lookup import LookupDrafter
from inference.drafters.mixed import mixed_drafter
from inference.drafters.none import NoDrafter
from inference.feature_drafts import FeatureDraftConfig
from inference.feature_drafts.dflash import Config as DFlash
from inference.feature_drafts.dspark import Config as DSpark
from inference.feature_drafts.eagle3 import Config as Eagle3
from inference.feature_drafts.medusa import Config as Medusa
from inference.feature_networks import make_network
from inference.lookup_settings import LookupSettings
from tests.inference.families import family_model


@pytest.mark.parametrize(
    "config",
    [
        Eagle3(block=3, taps=[0, 1], vocabulary=0),
        DSpark(block=3, taps=[0, 1], vocabulary=0),
        DFlash(block=3, taps=[0, 1], vocabulary=0),
        Medusa(block=3, taps=[0, 1], vocabulary=0),
    ],
)
def test_the_parts_of_a_feature_drafts_pass_are_told_apart(config: FeatureDraftConfig) -> None:
    target = family_model("llama", max_position_embeddings=512)
    network = make_network(config, target, None, seed=3).double().eval()
    for drafter in (FeatureDrafter(network), mixed_drafter(LookupDrafter(LookupSettings()), FeatureDrafter(network))):
        parts = draft_parts(drafter, tokens=8)
        assert parts is not None and tuple(parts) == PARTS
        assert parts["read"] > 0.0 and parts["block"] > 0.0 and parts["draw"] >= 0.0
        # EAGLE-3 runs a layer once a slot, after a start that costs next to nothing.
        if config.kind == "eagle3":
            assert parts["slots"] > parts["block"]


def test_other_drafts_have_no_parts() -> None:
    assert draft_parts(NoDrafter(), tokens=3) is None
    assert draft_parts(LookupDrafter(LookupSettings()), tokens=3) is None
