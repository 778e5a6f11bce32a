"""bitsandbytes on a GPU: packed drafts stay lossless there, and its products and 8-bit steps work."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from inference.decoder import decode
from inference.drafters import LoadContext, load_drafter
from inference.drafters.model import ModelDrafter
from inference.drafters.none import NoDrafter
from inference.drafters.quantized import check_packed_step
from inference.loading import load_causal_model
from inference.lookahead.fixed import FixedLookahead
from inference.randomness import TorchSource
from inference.request import Request
from inference.sampling_settings import SamplingSettings
from tests.pipelines.tiny import write_model
from train.optimizers.adamw8bit import Config as AdamW8bit

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")  # of a model as small as this one
@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
def test_a_packed_draft_keeps_the_targets_greedy_tokens(tmp_path: Path, weight_format: str) -> None:
    folder = write_model(tmp_path / "target", layers=3)
    target = load_causal_model(folder, precision="fp32", device=DEVICE)
    (tmp_path / "draft").mkdir()
    spec = {"kind": "quantized", "format": weight_format, "kept_layers": None}
    (tmp_path / "draft" / "draft.json").write_text(json.dumps(spec), encoding="utf-8")
    context = LoadContext(
        folder=tmp_path / "draft", target_folder=folder, target=target, precision="fp32", device=DEVICE
    )
    drafter = load_drafter(context)
    assert isinstance(drafter, ModelDrafter) and next(drafter.model.model.parameters()).is_cuda
    request = Request(settings=SamplingSettings(), max_new_tokens=24)
    taken = 0
    for seed in range(4):
        prompt = torch.randint(target.vocab_size, (6,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        found = [
            decode(target, arm, prompt, request=request, lookahead=ahead, generator=TorchSource.seeded(0))
            for arm, ahead in ((NoDrafter(), FixedLookahead(0)), (drafter, FixedLookahead(3)))
        ]
        assert found[1].tokens == found[0].tokens
        taken += len(found[1].tokens) - found[1].passes
    assert taken > 0, "some of what it proposes is taken"


@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
def test_packed_weights_can_be_trained_through(weight_format: str) -> None:
    check_packed_step(weight_format, DEVICE)


def test_eight_bit_adam_learns() -> None:
    with torch.random.fork_rng([DEVICE]):
        torch.manual_seed(0)
        layer = nn.Linear(128, 128, bias=False, device=DEVICE)
        rows, wanted = torch.randn(256, 128, device=DEVICE), torch.randn(256, 128, device=DEVICE)
    optimizer = AdamW8bit(lr=1e-2, min_8bit_size=1).build(layer.named_parameters())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(rows), wanted)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8
