"""Captions -> token ids, as all families' pipelines make them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor


def token_ids(
    tokenizer: Any, captions: Sequence[str], *, device: torch.device, length: int | None = None
) -> Int64[Tensor, "b l"]:
    """Pad or cut every caption to ``length`` tokens, the tokenizer's own maximum unless given."""
    encoded = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length if length is None else length,
        truncation=True,
        return_tensors="pt",
    )
    return cast(Tensor, encoded.input_ids.to(device))
