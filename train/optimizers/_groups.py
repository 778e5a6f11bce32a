"""Parameter groups and checks that all AdamW variants share. Not an optimizer."""

from typing import TYPE_CHECKING, Any

from train.optimizers import NamedParameters

if TYPE_CHECKING:
    from torch import nn


def _decays(name: str, parameter: "nn.Parameter") -> bool:
    """Matrices decay; biases, norms and anything with fewer than two dimensions do not."""
    return parameter.dim() >= 2 and not name.endswith("bias") and "norm" not in name.lower()


def parameter_groups(parameters: NamedParameters, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into one group with weight decay and one without; empty groups are left out.

    Args:
        parameters: names and parameters; the order inside a group is the order given.
        weight_decay: decay of the first group.
    """
    named = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if _decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not _decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_options(kind: str, *, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float) -> None:
    """Validate the numbers of an AdamW.

    Raises:
        ValueError: a number out of its range, by name.
    """
    if not 0.0 < lr < 10.0:
        raise ValueError(f"optimizer {kind}: lr is {lr}: choose a number above 0 and below 10")
    if not weight_decay >= 0.0:
        raise ValueError(f"optimizer {kind}: weight_decay is {weight_decay}: choose 0 or more")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"optimizer {kind}: {name} is {beta}: choose at least 0 and below 1")
    if not eps > 0.0:
        raise ValueError(f"optimizer {kind}: eps is {eps}: choose a number above 0")
