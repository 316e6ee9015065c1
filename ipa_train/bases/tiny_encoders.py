"""A random miniature of each family of image encoders, and of a whole CLIP; its image half stands beside the bases."""

from pathlib import Path
from typing import TypeVar

from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ipa_train.bases.tiny import randomise, tiny_tokenizer

Model = TypeVar("Model", bound=PreTrainedModel)
_SIZES = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}


def tiny_siglip(*, head: bool = True) -> SiglipVisionModel:
    """A random SigLIP vision model: 32 px, 16 patches, width 40; with or without its pooling head."""
    config = SiglipVisionConfig(**_SIZES, intermediate_size=64, image_size=32, vision_use_head=head)
    return _randomised(SiglipVisionModel(config))


def tiny_siglip2() -> Siglip2VisionModel:
    """A random NaFlex SigLIP 2 vision model: at most 16 patches of 8 px, width 40."""
    return _randomised(Siglip2VisionModel(Siglip2VisionConfig(**_SIZES, intermediate_size=64, num_patches=16)))


def tiny_dino(model_type: str = "dinov2") -> PreTrainedModel:
    """A random DINO of 32 px and width 40: dinov2, dinov2_with_registers or dinov3_vit (both with 4 registers)."""
    if model_type == "dinov2":
        return _randomised(Dinov2Model(Dinov2Config(**_SIZES, mlp_ratio=2, image_size=32)))
    if model_type == "dinov2_with_registers":
        return _randomised(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_SIZES, mlp_ratio=2, image_size=32)))
    sizes = _SIZES | {"num_attention_heads": 2}  # rotary positions want heads whose width is a multiple of 4
    config = DINOv3ViTConfig(**sizes, intermediate_size=64, image_size=32, num_register_tokens=4)
    return _randomised(DINOv3ViTModel(config))


def tiny_clip() -> CLIPModel:
    """A random CLIP, text and image: 32 px, 16 patches, width 40, projection 24, for ``tiny_tokenizer``."""
    sizes = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"projection_dim": 24}  # in each half, as published ones have it
    text = CLIPTextConfig(**sizes, vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513)
    vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    return _randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))


def save_tiny_scorers(folder: Path) -> tuple[Path, Path]:
    """Write a whole CLIP with its tokenizer and a DINOv2 under ``folder``; return their paths."""
    clip, dino = folder / "clip", folder / "dino"
    tiny_clip().save_pretrained(clip)
    tiny_tokenizer().save_pretrained(clip)
    tiny_dino().save_pretrained(dino)
    return clip, dino


def _randomised(model: Model) -> Model:
    randomise(model, seed=12)
    return model
