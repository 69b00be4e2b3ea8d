"""How far up a trunk each of its parameters lies: what `image.last:2` holds, and where rates are lower."""

from torch import nn

from lib.towers.blocks import blocks


def depths(trunk: nn.Module) -> dict[str, int]:
    """The depth of every parameter by name: 0 below the blocks, 1 to L in them, L + 1 behind the last one.

    L is the number of blocks; where none are known, every parameter has depth 0. An embedding lies below the blocks
    wherever a model lists it (MPNet's of relative positions stands behind its layers).
    """
    found = blocks(trunk)
    block_of = {id(p): number for number, block in enumerate(found, start=1) for p in block.parameters()}
    embeddings = {id(p) for m in trunk.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    depth_of, reached = {}, 0
    for name, parameter in trunk.named_parameters():
        if id(parameter) in block_of:
            reached = block_of[id(parameter)]
            depth_of[name] = reached
        elif id(parameter) in embeddings:
            depth_of[name] = 0
        else:
            # Trunks list their parts in the order of their forward: this one stands between two blocks, or behind all.
            depth_of[name] = reached + 1 if found and reached == len(found) else reached
    return depth_of
