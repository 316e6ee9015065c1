"""Captions -> token ids, as all families' pipelines make them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ipa_train.runtime.device import send


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
    return send(encoded.input_ids, device)
