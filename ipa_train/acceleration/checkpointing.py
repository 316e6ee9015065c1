"""What of a block's forward is kept for the backward, and what is computed again.

A frozen layer's backward needs no input of it, so what a denoiser keeps is mostly the inputs of norms, activations and
attention. Recomputation of a block starts from the block's arguments (arXiv 1604.06174).
"""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ipa_train.bases.base import Block

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
KEPT = (
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What ``selective`` does not compute again: the operations with the most FLOP for each value that they return.

Of 3 x 3 convolutions over d channels that is 18 d, of attention over s tokens 4 s, of a product 2 d. Products are thus
computed again: to keep them would double what is kept (docs/acceleration.md has the measurement).
Attention without a kernel of its own (``math``) is made of products over all pairs of tokens, and is computed again.
"""


def run(block: Block, *args: Any, **kwargs: Any) -> Any:
    """Keep all that autograd keeps."""
    return block(*args, **kwargs)


def run_full(block: Block, *args: Any, **kwargs: Any) -> Any:
    """Keep the block's arguments alone."""
    return _checkpoint(block, *args, **kwargs)


def run_selective(block: Block, *args: Any, **kwargs: Any) -> Any:
    """Keep the block's arguments and the outputs of :data:`KEPT`."""
    return _checkpoint(block, *args, context_fn=_contexts, **kwargs)


RUNS: dict[Checkpointing, Any] = {"none": run, "selective": run_selective, "full": run_full}

# Frozen models stay in eval mode and draw nothing, so no state of random generators is stored and set again.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
