"""An adapter's file in the real diffusers pipeline of its base, whatever the family."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from ipa_train.bases import Base, load_base
from ipa_train.bases.unet import UNetBase
from ipa_train.conditioning import (
    CLIPImageEncoder,
    DinoImageEncoder,
    FaceImageEncoder,
    ImageEncoder,
    SiglipImageEncoder,
    StoredEmbeddings,
)
from ipa_train.errors import ConfigError
from ipa_train.export.description import AdapterDescription, describe
from ipa_train.export.file import face_plus_v2, nested, read_adapter_file
from ipa_train.export.loadability import require_loadable
from ipa_train.export.usage import ENCODER_OPTIONS
from ipa_train.export.warm_start import check_image_encoder, check_sites, image_encoder_of

_ENCODERS: dict[str, Any] = {kind.__name__: kind for kind in (CLIPImageEncoder, SiglipImageEncoder, DinoImageEncoder)}


@dataclass(frozen=True)
class AdapterPipeline:
    """A base with an adapter loaded by diffusers' own ``load_ip_adapter``, and the encoder the adapter reads."""

    base: Base
    pipeline: Any
    image_encoder: ImageEncoder
    adapter: AdapterDescription

    def draw(
        self,
        prompt: str,
        image_features: Sequence[Float[Tensor, "n *_"]],
        *,
        scale: float | Mapping[str, Any] | None = None,
        masks: Sequence[Image.Image] = (),
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> list[Image.Image]:
        """Pictures of a prompt and of n image prompts together, by the pipeline's own options.

        ``scale`` is the weight of the image prompts, unless given diffusers' own, or that in each block (see
        ``layers.py``); ``masks`` are white where each of them counts. Without a ``negative_prompt`` a picture is guided
        away from what the base takes for no text.

        Raises:
            ConfigError: the family's pipeline takes no masks, no several image prompts, or no negative prompt.
        """
        if negative_prompt is not None and self.adapter.family == "flux":
            raise ConfigError(
                f"--negative-prompt: the pipeline of {self.base.path} is not guided away from a text: leave it."
            )
        kinds = self.adapter.feature_kinds
        nulls = [self.image_encoder.null_features(kind, self.base.null_image(kind)) for kind in kinds]
        guided = guidance_scale is None or guidance_scale > 1.0
        options |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        arguments = self.base.image_arguments(self.pipeline, image_features, nulls, guided=guided)
        if self.adapter.variant == "faceid_plus":
            # The pipeline repeats the embeddings for each of its pictures, but not what the projection was handed.
            projection = _face_projection(self.pipeline)
            projection.clip_embeds = projection.clip_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if masks and self.adapter.family != "unet":
            raise ConfigError(f"--mask: the pipeline of {self.base.path} takes no masks.")
        if masks:
            height, width = (options.get(name) or self.own_size for name in ("height", "width"))
            stacked = IPAdapterMaskProcessor().preprocess(list(masks), height, width).transpose(0, 1)
            options["cross_attention_kwargs"] = {"ip_adapter_masks": [stacked.to(self.pipeline.device)]}
            self.pipeline.set_ip_adapter_scale([[1.0 if scale is None else scale] * len(masks)])
        elif scale is not None:
            self.pipeline.set_ip_adapter_scale(scale)
        options |= {"negative_prompt": negative_prompt, "num_images_per_prompt": num_images_per_prompt}
        images: list[Image.Image] = self.pipeline(prompt, **arguments, **options).images
        return images

    @property
    def own_size(self) -> int:
        """Height and width of its pictures, in pixels, where nothing else is asked for."""
        pipeline = self.pipeline  # that of SD 1 and 2 alone has no name for it
        latent_size = getattr(pipeline, "default_sample_size", None) or pipeline.unet.config.sample_size
        return int(latent_size * self.base.vae.stride)

    @property
    def own_guidance_scale(self) -> float:
        """Guidance of its pictures, where nothing else is asked for."""
        return float(signature(self.pipeline.__call__).parameters["guidance_scale"].default)

    def check(self, *, size: int | None, num_inference_steps: int) -> None:
        """Refuse a height and width, or a number of steps, that the base cannot draw with.

        Raises:
            ConfigError: it cannot.
        """
        multiple, most = self.base.size_multiple, self.base.schedule.num_timesteps
        if size is not None and (size < multiple or size % multiple):
            raise ConfigError(f"--size {size} must be a multiple of {multiple}.")
        if size is not None and self.base.max_size is not None and size > self.base.max_size:
            raise ConfigError(f"--size {size} must be at most {self.base.max_size} for this base.")
        if not 1 <= num_inference_steps <= most:
            raise ConfigError(
                f"--steps {num_inference_steps} must be from 1 to {most}, which is how finely the base's noise is cut."
            )

    def features(
        self, pictures: Sequence[Image.Image], embeddings: Float[Tensor, "n *s f"] | None = None
    ) -> tuple[Float[Tensor, "n *_"], ...]:
        """What the adapter reads of pictures, or of stored embeddings: encoded as in training."""
        rows = []
        for i in range(len(pictures) or len(embeddings if embeddings is not None else ())):
            pixels = None
            if pictures:
                pixels = to_pixels(pictures[i]).to(self.pipeline.device)
            stored = None if embeddings is None else embeddings[i : i + 1].to(self.pipeline.device)
            rows.append(self.image_encoder.features(pixels, self.adapter.feature_kinds, embeddings=stored))
        return tuple(torch.cat(kind) for kind in zip(*rows, strict=True))


def to_pixels(image: Image.Image) -> UInt8[Tensor, "1 c h w"]:
    """An RGB picture as a batch of one."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2)


def load_pipeline(
    base: str,
    adapter_file: Path,
    image_encoder: str,
    *,
    subfolder: str = "",
    dtype: str,
    device: str,
    **base_options: Any,
) -> AdapterPipeline:
    """Plain diffusers with an adapter in it; ``image_encoder`` is left aside where the adapter needs none.

    ``base_options`` are those of the family's ``from_pretrained``, such as ``revision``.

    Raises:
        ConfigError, ExportError: the base, encoder or file cannot be loaded, or do not belong together.
    """
    source = str(adapter_file)
    state, metadata = read_adapter_file(adapter_file)
    adapter = describe(state, source=source)
    require_loadable(adapter, source=source)
    said = image_encoder_of(metadata)
    if not said.get("embedding"):
        # Face adapters read vectors of unit length, but for one that was released with this in its name.
        normalize = adapter.variant.startswith("faceid") and "unnorm" not in adapter_file.name
        name = said.get("name", "arcface")
        said |= {"embedding": {"name": name, "shape": [adapter.feature_dim], "normalize": normalize}}
    encoder = _image_encoder(adapter, said, image_encoder, subfolder=subfolder, dtype=dtype)
    for kind, dim in zip(adapter.feature_kinds, (adapter.feature_dim, adapter.hidden_dim), strict=False):
        if encoder.feature_dim(kind) != dim:
            raise ConfigError(
                f"{source}: made for an image encoder of width {dim}, and {image_encoder} gives "
                f"{encoder.feature_dim(kind)}."
            )
    check_image_encoder(metadata, encoder, source=source)
    frozen = load_base(base, dtype=dtype, vae_dtype=dtype, **base_options)
    if frozen.context_dim != adapter.context_dim:
        raise ConfigError(
            f"{source}: made for a base whose image tokens have width {adapter.context_dim}, and {base} has "
            f"{frozen.context_dim}."
        )
    check_sites(adapter, frozen.attention_sites(), source=source)
    if isinstance(frozen, UNetBase) and _zero_terminal_snr(metadata):
        frozen.schedule = frozen.schedule.with_zero_terminal_snr()
    pipeline = frozen.pipeline()
    with _quiet():
        # The tensors and not the file's path: they may have come out of a layout that diffusers does not read.
        frozen.load_adapter(pipeline, nested(state))
        if adapter.variant == "faceid_plus":
            _face_projection(pipeline).shortcut = face_plus_v2(adapter_file, metadata) or False
        return AdapterPipeline(frozen, pipeline.to(device), encoder.to(device), adapter)


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute diffusers' advice on loading by hand: which encoder it did not load, where a LoRA has no weights."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _face_projection(pipeline: Any) -> Any:
    (projection,) = pipeline.unet.encoder_hid_proj.image_projection_layers
    return projection


def _zero_terminal_snr(metadata: Mapping[str, str]) -> bool:
    """Whether the adapter was trained to begin with noise alone (``objective.zero_terminal_snr``)."""
    try:
        return json.loads(metadata.get("objective", "{}")).get("zero_terminal_snr") is True
    except (ValueError, AttributeError):  # somebody else's metadata
        return False


def _image_encoder(
    adapter: AdapterDescription, said: Mapping[str, Any], path: str, *, subfolder: str, dtype: str
) -> ImageEncoder:
    """The encoder that the adapter's kind and the account in its file ask for."""
    usual = {"faceid": "StoredEmbeddings", "faceid_plus": "FaceImageEncoder", "time_resampler": "SiglipImageEncoder"}
    name = said.get("encoder", usual.get(adapter.variant, "CLIPImageEncoder"))
    *tokens, dim = said["embedding"]["shape"]
    embedding = {"dim": dim, "name": said["embedding"]["name"], "normalize": said["embedding"]["normalize"]}
    if name == "StoredEmbeddings":
        return StoredEmbeddings(**embedding, num_tokens=tokens[0] if tokens else None)
    if name == "FaceImageEncoder":
        return FaceImageEncoder.from_pretrained(path, subfolder=subfolder, dtype=dtype, **embedding)
    if name not in _ENCODERS:
        raise ConfigError(f"the adapter reads the image encoder {name}, which this version does not have.")
    given = {option: said[option] for option in ENCODER_OPTIONS[name] if option in said}
    encoder: ImageEncoder = _ENCODERS[name].from_pretrained(path, subfolder=subfolder, dtype=dtype, **given)
    return encoder
