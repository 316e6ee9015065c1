"""Dumps of Tencent's training scripts: the adapter somewhere among the weights of the whole frozen denoiser.

accelerate writes them as ``unet.*``, ``image_proj_model.*`` and ``adapter_modules.N.*``. The scripts register their
attention weights twice; safetensors keeps one of two names for one tensor, and then ``adapter_modules`` is what gets
lost, so that the conversion in their README gives an empty adapter (IP-Adapter issues 166, 164, 246, 375, 436). The
weights are still there, under the denoiser's names.
"""

import re
from collections.abc import Iterable

_PARTS = {
    "image_proj": "image_proj",
    "image_proj_model": "image_proj",
    "ip_adapter": "ip_adapter",
    "adapter_modules": "ip_adapter",
}
# The order in which a UNet lists its attentions: the middle block comes last.
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")
_PROCESSOR = re.compile(
    rf"unet\.({'|'.join(_BLOCKS)})\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2\.processor\."
    r"(to_[kv]_ip\.weight)"
)


def is_training_dump(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a whole training, not of an adapter alone."""
    return any(name.startswith("image_proj_model.") for name in names)


def interchange_to_dump(names: Iterable[str]) -> dict[str, str]:
    """Interchange name of each of the adapter's tensors -> its name in the dump."""
    names = list(names)
    found = {}
    for name in names:
        part, _, rest = name.partition(".")
        if part in _PARTS:
            found[f"{_PARTS[part]}.{rest}"] = name
    if not any(name.startswith("ip_adapter.") for name in found):
        found |= _processors(names)
    return found


def _processors(names: Iterable[str]) -> dict[str, str]:
    """Number the weights found under the denoiser's names: self- and cross-attentions alternate, ours are the odd."""
    matches = [m for name in names if (m := _PROCESSOR.fullmatch(name))]
    places = {m: (_BLOCKS.index(m[1]), *(int(m[i] or 0) for i in (2, 3, 4))) for m in matches}
    order = sorted(set(places.values()))
    return {f"ip_adapter.{2 * order.index(places[m]) + 1}.{m[5]}": m[0] for m in matches}
