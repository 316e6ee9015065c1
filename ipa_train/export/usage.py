"""Lines of Python that draw with an adapter in plain diffusers, whichever image encoder it reads.

An encoder that ``load_ip_adapter`` cannot hold is run by the lines themselves.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ipa_train.adapter.projector import FeatureKind
from ipa_train.errors import ExportError, did_you_mean
from ipa_train.export.description import AdapterDescription
from ipa_train.export.recognise import Family

# Of each encoder, the entries of its identity that are arguments too.
ENCODER_OPTIONS: dict[str, tuple[str, ...]] = {
    "CLIPImageEncoder": (),
    "SiglipImageEncoder": ("layer",),
    "DinoImageEncoder": ("layer", "image_size"),
    "FaceImageEncoder": (),
    "StoredEmbeddings": (),
}
_PICTURE = """\
picture = torch.from_numpy(numpy.array(Image.open("image_prompt.png").convert("RGB"))).permute(2, 0, 1)[None]
"""
_EMBEDDING = """\
embeddings = torch.from_numpy(numpy.load("embedding.npy"))[None]
"""
_FEATURES = """\
features = encoder.encode({picture}, "{kind}", embeddings={embeddings})
"""
_NULL: dict[Family, str] = {
    "unet": """\
# "No image" comes first; with guidance_scale <= 1 give both[1:] alone.
both = torch.cat([encoder.null_features("{kind}"), features])[:, None]
""",
    "sd3": """\
# "No image" comes first; with guidance_scale <= 1 give both[1:] alone.
both = torch.cat([encoder.null_features("{kind}", "zero_features"), features])
""",
    "flux": """\
null = encoder.null_features("{kind}", "black_image")
""",
}
_UNET_LOAD = """\
pipe.load_ip_adapter(".", subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
"""
_LOAD: dict[Family, str] = {
    "unet": _UNET_LOAD,
    "sd3": _UNET_LOAD,
    "flux": """\
pipe.load_ip_adapter(
    ".", weight_name="ip_adapter.safetensors", image_encoder_pretrained_model_name_or_path=None
)
""",
}
_LOOKS = """\
looks = torch.cat([encoder.null_features("penultimate"), encoder.encode(picture, "penultimate")])[:, None]
projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
projection.clip_embeds, projection.shortcut = looks.to(pipe.device, pipe.dtype), {shortcut}
"""
_DRAW: dict[Family, str] = {
    "unet": """\
image = pipe("a caption", ip_adapter_image_embeds=[both.to(pipe.device, pipe.dtype)]).images[0]
""",
    "sd3": """\
image = pipe("a caption", ip_adapter_image_embeds=both.to(pipe.device, pipe.dtype)).images[0]
""",
    "flux": """\
features, null = (x[None].to(pipe.device, pipe.dtype) for x in (features, null))
image = pipe("a caption", ip_adapter_image_embeds=[features], negative_ip_adapter_image_embeds=[null]).images[0]
""",
}

_HELD: dict[Family, tuple[str, str]] = {
    "unet": ("CLIPVisionModelWithProjection", _UNET_LOAD),
    "sd3": ("SiglipVisionModel", _UNET_LOAD),
    "flux": ("CLIPVisionModelWithProjection", _LOAD["flux"]),
}
"""The class of the encoder that diffusers' loader holds itself, and how the adapter is loaded beside it."""


def pipeline_lines(
    base: str | None, identity: Mapping[str, Any], adapter: AdapterDescription, *, shortcut: bool = False
) -> str:
    """A whole script: the pipeline of ``base`` (hub id or folder), the encoder, the adapter, and a picture.

    Arguments and errors otherwise as of :func:`paste_lines`.
    """
    name = _literal(base or "the base model")
    lines = paste_lines(identity, adapter.feature_kinds[0], family=adapter.family, shortcut=shortcut)
    if lines:
        return f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({name})\n{lines}"
    encoder, load = _HELD[adapter.family]
    options = f", subfolder={_literal(identity['subfolder'])}" if identity.get("subfolder") else ""
    source = f"{_literal(identity['name'])}{options}"
    processor = "SiglipImageProcessor" if adapter.family == "sd3" else ""
    held = "image_encoder=image_encoder" + ", feature_extractor=feature_extractor" * bool(processor)
    return "".join(
        [
            "from diffusers import DiffusionPipeline\nfrom diffusers.utils import load_image\n",
            f"from transformers import {', '.join(filter(None, (processor, encoder)))}\n\n",
            f"image_encoder = {encoder}.from_pretrained({source})\n",
            f"feature_extractor = {processor}.from_pretrained({source})\n" if processor else "",
            f"pipe = DiffusionPipeline.from_pretrained({name}, {held})\n",
            load,
            "pipe.set_ip_adapter_scale(0.6)\n",
            'image = pipe("a caption", ip_adapter_image=load_image("image_prompt.png")).images[0]\n',
        ]
    )


def hub_id(name: object) -> str | None:
    """``name`` if it is of the form OWNER/NAME."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def paste_lines(
    identity: Mapping[str, Any], kind: FeatureKind, *, family: Family = "unet", shortcut: bool = False
) -> str:
    """Python that draws with a diffusers pipeline ``pipe`` of the family; "" if its loader holds the encoder itself.

    ``identity`` is that of the encoder (``ImageEncoder.identity()``), ``kind`` that of the features which the adapter
    reads; a FaceID-Plus adapter reads both, whatever is said, and ``shortcut`` is whether it is of the second version.
    Run where ``ip_adapter.safetensors`` lies, and ``image_prompt.png`` or ``embedding.npy``; an encoder that was loaded
    from a folder is named by that folder's name.

    Raises:
        ExportError: the identity is not of an encoder that this version has.
    """
    if family in identity.get("diffusers_loader", (family,)):  # files that do not say were made with CLIP
        return ""
    encoder, embedding = str(identity.get("encoder")), identity.get("embedding")
    if encoder not in ENCODER_OPTIONS:
        raise ExportError(
            f"the image encoder {encoder!r} is none of this version.{did_you_mean(encoder, ENCODER_OPTIONS)}"
        )
    face = encoder == "FaceImageEncoder"
    looks_at_pictures, reads_stored = identity["image_size"] is not None, embedding is not None
    lines = ["import numpy\nimport torch\n"]
    lines += ["from PIL import Image\n"] if looks_at_pictures else []
    lines += [f"\nfrom ipa_train.conditioning import {encoder}\n\n", f"encoder = {_constructor(identity, encoder)}\n"]
    lines += [_PICTURE] if looks_at_pictures else []
    lines += [_EMBEDDING] if reads_stored else []
    lines += [
        (_FEATURES + _NULL[family]).format(
            kind="pooled" if face else kind,
            picture="picture" if looks_at_pictures else "None",
            embeddings="embeddings" if reads_stored else "None",
        ),
        _LOAD[family],
    ]
    lines += [_LOOKS.format(shortcut=shortcut)] if face else []
    return "".join([*lines, _DRAW[family]])


def _constructor(identity: Mapping[str, Any], encoder: str) -> str:
    options = {name: identity[name] for name in ENCODER_OPTIONS[encoder]}
    if (embedding := identity.get("embedding")) is not None:
        *tokens, dim = embedding["shape"]
        options |= {"dim": dim, "name": embedding["name"], "normalize": embedding["normalize"]}
        options |= {"num_tokens": tokens[0]} if tokens else {}
    if encoder == "StoredEmbeddings":
        return f"{encoder}({_arguments(options)})"
    options |= {"subfolder": identity["subfolder"]} if identity.get("subfolder") else {}
    return f"{encoder}.from_pretrained({_literal(identity['name'])}, {_arguments(options | {'dtype': 'float32'})})"


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_literal(value)}" for name, value in options.items())


def _literal(value: object) -> str:
    """As Python would write it, and formatters: what is read from a file must not end a string before its time."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
