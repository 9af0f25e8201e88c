"""ViT-Ti (Touvron et al. 2021; timm) for small images: patches of 4x4 pixels, width 192, depth 12, 3 heads."""

from torch import nn


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """5,362,762 parameters at 3x32x32, k = 10; no dropout; phi is the class token after the final norm, m = 192."""
    import timm  # here: it takes a second to import, and a worker may never need it

    channels, height, width = shape
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", patch_size=4, img_size=(height, width), in_chans=channels, num_classes=classes
    )
    for module in model.modules():
        if "fused_attn" in vars(module):  # the fused kernels have no second derivative, which sharpness measures take
            vars(module)["fused_attn"] = False
    return model
