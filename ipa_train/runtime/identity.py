"""What a model is, whatever file it came from."""

import hashlib

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's weights rounded to fp16: fp32 and fp16 files of one model are the same model."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.to("cpu", torch.float16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
