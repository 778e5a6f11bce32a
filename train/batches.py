"""What a batch is and how to name one. Not a data loader: batches come from a function of the step."""

import hashlib

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def batch_digest(batch: Batch) -> str:
    """Return 16 hex digits that name a batch by its content: keys, dtypes, shapes and bytes, in order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        tensor = batch[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
