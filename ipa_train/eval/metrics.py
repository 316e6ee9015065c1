"""How near generated pictures come to their image prompts and captions: CLIP-I, CLIP-T and DINO similarity."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ipa_train.bases.tokens import token_ids
from ipa_train.conditioning import CLIPImageEncoder, DinoImageEncoder
from ipa_train.errors import ConfigError
from ipa_train.runtime.precision import to_dtype

CLIP_SCORE_WEIGHT = 2.5
"""Of CLIPScore (arXiv 2104.08718, eq. 1): 2.5 max(cosine, 0)."""


class CLIPTextEncoder(nn.Module):
    """The text half of a CLIP, frozen."""

    def __init__(self, model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.model: nn.Module = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str, *, dtype: str = "float32") -> "CLIPTextEncoder":
        """Load from the local folder or hub id of a whole CLIP with its tokenizer.

        Raises:
            ConfigError: nothing there to load, or no text model with a projection and a tokenizer.
        """
        precision = to_dtype(dtype, option="dtype")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(path)
            model, report = CLIPTextModelWithProjection.from_pretrained(path, dtype=precision, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{path}: cannot load the text half of a CLIP: {reason}") from error
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"{path}: the text half of its CLIP is not there (weights are missing, e.g. {missing[0]}): give a "
                "whole CLIP, such as openai/clip-vit-large-patch14."
            )
        return cls(model, tokenizer)

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Float[Tensor, "b f"]:
        """Projected embeddings; captions longer than the model's text are cut."""
        parameter = next(self.model.parameters())
        return cast(Tensor, self.model(token_ids(self.tokenizer, captions, device=parameter.device)).text_embeds)


class SimilarityScores(nn.Module):
    """Scores of each generated picture, in the measures of the paper (arXiv 2308.06721, 4.1.2), by frozen models.

    - ``clip_i``: cosine of the CLIP embeddings of picture and image prompt, -1 to 1.
    - ``clip_t``: CLIPScore of picture and caption, 2.5 max(cosine, 0): what the paper's Table 1 calls CLIP-T. Others
      report the cosine alone under that name.
    - ``dino``: cosine of DINO's class tokens of picture and image prompt, -1 to 1; here DINOv2 or v3.

    The paper scores by CLIP ViT-L/14. Numbers by different models cannot be compared.
    """

    def __init__(
        self,
        *,
        clip: CLIPImageEncoder | None = None,
        clip_text: CLIPTextEncoder | None = None,
        dino: DinoImageEncoder | None = None,
    ) -> None:
        super().__init__()
        self.clip, self.clip_text, self.dino = clip, clip_text, dino
        if clip is None and clip_text is not None:
            raise ConfigError("clip_text scores against pictures: give clip as well.")

    @classmethod
    def from_pretrained(
        cls, *, clip: str | None = None, dino: str | None = None, dtype: str = "float32"
    ) -> "SimilarityScores":
        """Load from local folders or hub ids: a whole CLIP, a DINOv2 or DINOv3, or both.

        Raises:
            ConfigError: nothing there to load, or another kind of model.
        """
        return cls(
            clip=None if clip is None else CLIPImageEncoder.from_pretrained(clip, dtype=dtype),
            clip_text=None if clip is None else CLIPTextEncoder.from_pretrained(clip, dtype=dtype),
            dino=None if dino is None else DinoImageEncoder.from_pretrained(dino, dtype=dtype),
        )

    @property
    def names(self) -> list[str]:
        """Scores that these models give."""
        models = {"clip_i": self.clip, "clip_t": self.clip_text, "dino": self.dino}
        return [name for name, model in models.items() if model is not None]

    @torch.no_grad()
    def forward(
        self,
        pictures: UInt8[Tensor, "b c h w"],
        image_prompts: UInt8[Tensor, "b c p q"],
        captions: Sequence[str],
    ) -> dict[str, Float[Tensor, "b"]]:
        """Each score of each sample, fp32. Pictures are RGB 0..255 of any size: resized and cropped as CLIP does it."""
        scores = {}
        if self.clip is not None:
            drawn = self.clip.encode(pictures, "pooled")
            scores["clip_i"] = _cosine(drawn, self.clip.encode(image_prompts, "pooled"))
            if self.clip_text is not None:
                scores["clip_t"] = CLIP_SCORE_WEIGHT * _cosine(drawn, self.clip_text(captions)).clamp(min=0.0)
        if self.dino is not None:
            drawn, wanted = (self.dino.encode(images, "pooled") for images in (pictures, image_prompts))
            scores["dino"] = _cosine(drawn, wanted)
        return scores

    def identity(self) -> dict[str, Any]:
        """Which models score, in plain values that JSON holds."""
        models = {"clip": self.clip, "dino": self.dino}
        return {name: model.identity() for name, model in models.items() if model is not None}


def _cosine(a: Float[Tensor, "b f"], b: Float[Tensor, "b f"]) -> Float[Tensor, "b"]:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
