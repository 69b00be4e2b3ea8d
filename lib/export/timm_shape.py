"""timm's name for the image tower of a SigLIP, or the settings by which timm builds one of any shape."""

import torch

# timm's words for the sizes: width, layers, heads, units of the hidden layers.
SIZES = {
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
EPS = 1e-6
"""Of timm's layer norms."""


def timm_name(vision: dict) -> str | None:
    """The model of timm with this vision_config of SigLIP; None where no name has its shape, size and activation."""
    import timm

    name = f"vit_{SIZES.get(_shape(vision))}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        activation = timm.create_model(name).blocks[0].mlp.act
    # timm's base and large models have the exact GELU, transformers' SigLIP its approximation by tanh.
    exact = isinstance(activation, torch.nn.GELU) and activation.approximate == "none"
    return name if exact == (vision["hidden_act"] == "gelu") else None


def timm_shape(vision: dict) -> dict:
    """The content of timm's config.json for a vision_config of SigLIP."""
    width, layers, heads, _ = _shape(vision)
    side = vision["image_size"]
    return {
        "architecture": "vit_base_patch16_siglip_224",  # its settings are all given here
        "num_classes": 0,
        "model_args": {
            "img_size": side,
            "patch_size": vision["patch_size"],
            "embed_dim": width,
            "depth": layers,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio(vision),
            "act_layer": ACTIVATIONS[vision["hidden_act"]],
        },
        "pretrained_cfg": {"input_size": [3, side, side]},
    }


def mlp_ratio(part: dict) -> float:
    """Units of the hidden layers for each dimension."""
    return part["intermediate_size"] / part["hidden_size"]


def _shape(part: dict) -> tuple[int, int, int, int]:
    return part["hidden_size"], part["num_hidden_layers"], part["num_attention_heads"], part["intermediate_size"]
