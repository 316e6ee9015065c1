"""How near generated pictures are to real ones as a whole: FID and KID, over the features of a network of choice."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import AutoConfig

from ipa_train.conditioning import CLIPImageEncoder, DinoImageEncoder, SiglipImageEncoder
from ipa_train.errors import ConfigError, did_you_mean

INCEPTION = "inception"
"""The network of the papers that report FID: Inception v3 with torch-fidelity's port of the original weights."""
_SUBSET_SIZE = 1000  # of KID, as in its paper (arXiv 1801.01401)
_CHUNK = 4096
_ENCODERS: dict[str, Any] = {"clip": CLIPImageEncoder, "siglip": SiglipImageEncoder, "dinov": DinoImageEncoder}


class FeatureNetwork(nn.Module):
    """Pictures -> the features between whose distributions FID and KID measure."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_pretrained(cls, path: str) -> "FeatureNetwork":
        """Load ``inception``, or the folder or hub id of a CLIP, SigLIP or DINO (v2, v3) of transformers.

        Raises:
            ConfigError: torch-fidelity is not installed, its weights cannot be had, or no such model.
        """
        return cls(_inception() if path == INCEPTION else _vision_model(path))

    @torch.no_grad()
    def forward(self, pictures: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Features in fp32 of RGB 0..255 pictures of any size."""
        if isinstance(self.network, NoTrainInceptionV3):
            return self.network(pictures).float()
        return self.network.encode(pictures, "pooled").float()  # type: ignore[operator]


@dataclass(frozen=True)
class Distances:
    """Between the distributions of real and of generated pictures; smaller is nearer."""

    fid: float
    kid: float
    """Mean over 100 subsets of at most 1,000 pictures."""
    kid_std: float
    """Its standard deviation over the subsets."""


def distances(real: Float[Tensor, "n f"], generated: Float[Tensor, "m f"]) -> Distances | None:
    """FID (arXiv 1706.08500) and KID (arXiv 1801.01401) by torchmetrics; None for less than two pictures on a side."""
    smaller = min(len(real), len(generated))
    if smaller < 2:
        return None
    stored = _StoredFeatures(real.shape[1])
    fid = FrechetInceptionDistance(feature=stored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that KID keeps all features, which it was handed
        kid = KernelInceptionDistance(feature=stored, subset_size=min(_SUBSET_SIZE, smaller))
    for features, is_real in ((real, True), (generated, False)):
        for chunk in torch.split(features, _CHUNK):
            fid.update(chunk, real=is_real)
            kid.update(chunk, real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # KID draws its subsets
        mean, std = kid.compute()
    return Distances(float(fid.compute()), float(mean), float(std))


class _StoredFeatures(nn.Module):
    """The network, where its features are what is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _inception() -> nn.Module:
    try:
        return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--fid inception needs torch-fidelity, which is not installed: pip install torch-fidelity; or give --fid "
            "another network, such as facebook/dinov2-base."
        ) from error
    except OSError as error:
        raise ConfigError(f"--fid inception: its weights cannot be downloaded: {error}.") from error


def _vision_model(path: str) -> nn.Module:
    try:
        model_type = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--fid {path}: no model there: {reason}{did_you_mean(path, [INCEPTION, 'none'])}") from error
    for prefix, encoder in _ENCODERS.items():
        if model_type.startswith(prefix):
            try:
                network: nn.Module = encoder.from_pretrained(path, dtype="float32")
            except ConfigError as error:
                raise ConfigError(f"--fid {path}: {error}") from error
            return network
    raise ConfigError(f"--fid {path}: a {model_type!r}; give a CLIP, SigLIP, DINOv2 or DINOv3, or {INCEPTION}.")
