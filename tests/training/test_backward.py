"""The backward reaches down to the first site that is adapted, and no further."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ipa_train.bases import StableDiffusion, StableDiffusionXL
from tests.training.conftest import make_batch

# What runs before the first attention that is adapted, and what leads on from it.
BELOW = {
    "sd15": ("conv_in.", "time_embedding.", "down_blocks.0.resnets.0."),
    "sdxl": ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.0.", "down_blocks.1.resnets.0."),
}
ABOVE = ("down_blocks.1.resnets.1.", "mid_block.resnets.", "up_blocks.2.resnets.", "conv_out.")


class Touched(TorchDispatchMode):
    """Names of the weights that any operator is given."""

    def __init__(self, model):
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.found |= {self.names[t.data_ptr()] for t in tensors if t.data_ptr() in self.names}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", BELOW)
def test_nothing_below_the_first_site_has_a_backward(family, checkpointing, make_module, tiny_models, tiny_sdxl):
    if family == "sd15":
        base = StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="float32")
    else:
        base = StableDiffusionXL.from_pretrained(str(tiny_sdxl[0]), dtype="float32")
    if checkpointing:
        base.wrap_blocks(lambda block: partial(checkpoint, block, use_reentrant=False))
    module = make_module(base=base)
    with Touched(base.unet) as forward:
        loss = module.training_step(make_batch(range(2)), 0)
    assert any(name.startswith(BELOW[family]) for name in forward.found)
    with Touched(base.unet) as backward:
        loss.backward()
    assert not [name for name in backward.found if name.startswith(BELOW[family])]
    for part in ABOVE:
        assert any(name.startswith(part) for name in backward.found), part
