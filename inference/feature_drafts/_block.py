"""Settings of drafts that propose a whole block in one pass; the backbone is in `inference.feature_networks._block`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from inference.errors import InputError
from inference.feature_drafts import FeatureDraftConfig

if TYPE_CHECKING:
    from inference.model import CausalModel

LEARNED, TOKEN = "learned", "token"


@dataclass(kw_only=True)
class BlockConfig(FeatureDraftConfig):
    """Settings of drafts on this backbone, besides the common ones.

    Attributes:
        qk_norm: norm queries and keys per head; engines that serve these drafts expect it.
        mask: what stands in the place of tokens to come: `token` is the target's own embedding of a token that ordinary
            text never holds, as in published drafts, which every engine can serve; `learned` is a vector of the
            draft's, which some engines have no place for.
        mask_token: id of that token; -1 chooses it (`inference.unused_tokens`).
    """

    qk_norm: bool = True
    mask: str = LEARNED
    mask_token: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in (LEARNED, TOKEN):
            raise ValueError(f"draft.{self.kind}.mask is {self.mask!r}; choose {LEARNED} or {TOKEN}")

    def for_target(self, target: "CausalModel") -> "BlockConfig":
        """See `FeatureDraftConfig.for_target`: settles which token is the mask."""
        if self.mask != TOKEN:
            return self
        from inference.unused_tokens import unused_token

        token = unused_token(target.tokenizer, target.vocab_size) if self.mask_token < 0 else self.mask_token
        if token is None or token >= target.vocab_size:
            raise InputError(
                "the target has no token that ordinary text never holds" if token is None else f"no token {token}",
                where=f"draft.{self.kind}.mask_token",
                mend=f"name one of its {target.vocab_size} tokens, or use draft.{self.kind}.mask={LEARNED}",
            )
        return replace(self, mask_token=token)
