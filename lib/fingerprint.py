"""Names for what was computed from a model and its inputs: a hash that changes when any of it does."""

from hashlib import blake2b

import numpy as np
import torch


def fingerprint(*parts: object) -> str:
    """A hash of the parts: modules by their weights, arrays by their bytes, the rest by what it prints as."""
    digest = blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy() if tensor.ndim else b"")
                digest.update(repr(tensor.item()).encode() if not tensor.ndim else b"")
        elif isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"\x1f")
    return digest.hexdigest()
