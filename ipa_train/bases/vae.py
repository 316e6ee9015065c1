"""The frozen autoencoder of latent diffusion: pictures to scaled latents and back."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ipa_train.errors import ConfigError
from ipa_train.runtime.identity import weights_sha256
from ipa_train.runtime.precision import to_dtype


@dataclass(frozen=True)
class LatentPosterior:
    """The VAE's Gaussian over latents, already scaled to what the denoiser is trained on."""

    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return ``mean + std * noise``."""
        return self.mean + self.std * noise


class FrozenVAE(nn.Module):
    """An AutoencoderKL, read as its family's pipelines read it."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.stride: int = 2 ** (len(model.config.block_out_channels) - 1)
        """Pixels per latent, in each direction."""
        self.num_channels: int = model.config.latent_channels
        """Of the latents."""

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        alone: bool = False,
        dtype: str = "bfloat16",
        revision: str | None = None,
        variant: str | None = None,
    ) -> "FrozenVAE":
        """Load the ``vae`` of a diffusers folder or hub id; if ``alone``, that path is the VAE's own.

        Raises:
            ConfigError: nothing there to load.
        """
        precision = to_dtype(dtype, option="base.vae_dtype")
        try:
            model = AutoencoderKL.from_pretrained(
                path,
                subfolder=None if alone else "vae",
                torch_dtype=torch.float32,
                revision=revision,
                variant=variant,
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            what = "cannot load its VAE" if Path(path).exists() else "no such folder, nor a hub id that can be reached"
            option = "base.vae_path" if alone else "base.path"
            raise ConfigError(f"{option}={path}: {what}: {reason}") from error
        vae = cls(model)
        _ = vae._weights_sha256  # of the weights as they are stored, before they are rounded
        nn.Module.to(model, precision)  # diffusers' own warns of modules to be kept in fp32, also where there are none
        return vae

    @property
    def dtype(self) -> torch.dtype:
        """Precision it runs in."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def _scaling(self) -> float:
        return float(self.model.config.scaling_factor)

    @property
    def _shift(self) -> float:
        return float(getattr(self.model.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "b c h w"]) -> LatentPosterior:
        """Encode RGB 0..255 into the fp32 posterior, shifted and scaled as the denoiser is trained on."""
        posterior = self.model.encode((pixels / 127.5 - 1.0).to(self.dtype)).latent_dist
        mean = (posterior.mean.float() - self._shift) * self._scaling
        return LatentPosterior(mean, posterior.std.float() * self._scaling)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 p q"]:
        """RGB 0..255 of scaled latents."""
        decoded = self.model.decode((latents / self._scaling + self._shift).to(self.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)

    def identity(self) -> dict[str, Any]:
        """What latents depend on: the weights, and how they are shifted and scaled."""
        shift = {"shift_factor": self._shift} if self._shift else {}
        return {"vae_sha256": self._weights_sha256, "scaling_factor": self._scaling, **shift}

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.model)
