"""What an export is made from: a feature network bound to its target, and what the two are called."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inference.drafters.mixed import INNER_FOLDER
from inference.feature_networks import FeatureNetwork
from inference.model import CausalModel
from inference.pair_files import DRAFT_FILE, read_draft_spec


@dataclass(frozen=True)
class Source:
    """A draft that reads features, ready to be written in another format.

    Attributes:
        network: in fp32, bound to the target.
        target: in fp32.
        tokens: proposed a round, as the score chose it; the trained block where it chose nothing.
        verifier: what the target is called: a folder or an id.
    """

    network: FeatureNetwork
    target: CausalModel
    tokens: int
    verifier: str

    @property
    def kind(self) -> str:
        """Of the network: `eagle3`, `dflash`, ..."""
        return self.network.config.kind

    @property
    def scaled_embedding(self) -> bool:
        """Whether the target's family puts a factor behind the rows of its embedding, inside its module or after it."""
        probe = torch.arange(min(self.network.shape.vocab, 8), device=self.target.device)
        rows = self.target.embedding.get_parameter("weight").detach()[probe]
        return not torch.equal(self.network.borrowed.embed(probe), rows)

    @property
    def own_embedding(self) -> bool:
        """Whether the draft reads another embedding than the rows that the target stores."""
        return self.scaled_embedding or getattr(self.network, "mask_embedding", None) is not None

    def embedding(self) -> Tensor:
        """The embedding `[V, D]` that the draft reads, factor included."""
        tokens = torch.arange(self.network.shape.vocab, device=self.target.device)
        return self.network.borrowed.embed(tokens).clone()

    def head(self) -> Tensor:
        """Rows of the output head that the draft uses, `[Vd, D]`."""
        if self.network.vocabulary is not None:
            return self.network.lm_head.weight.detach()
        return self.target.head.linear.get_parameter("weight").detach()


def model_folder(draft: Path) -> tuple[Path, str]:
    """Folder and kind of the draft model itself: behind look-up it is the other draft that engines can load."""
    kind = str(read_draft_spec(draft)["kind"])
    if kind == "mixed" and (draft / INNER_FOLDER / DRAFT_FILE).is_file():
        return model_folder(draft / INNER_FOLDER)
    return draft, kind
