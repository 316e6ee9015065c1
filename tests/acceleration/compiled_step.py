"""Steps of a tiny Flux, compiled and plain; a program of its own, since shape checks of tests cannot be traced.

python -m tests.acceleration.compiled_step FOLDER COMPILE CHECKPOINTING BACKEND: prints, for pictures of three sizes and
the first again, how far loss and gradients are from plain ones (relative), and how many graphs there are by then.
"""

import json
import sys

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ipa_train.acceleration import Acceleration, acceleration
from ipa_train.acceleration.compilation import compiled
from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import Flux
from ipa_train.bases.tiny import randomise

SIZES = (16, 16), (8, 24), (32, 16)


def loss_and_gradients(base, adapter, size):
    adapter.zero_grad()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, *size, generator=generator)
    tokens = adapter(torch.randn(2, 24, generator=generator))
    loss = base.predict(latents, torch.tensor([10.0, 900.0]), base.encode_text(["a", "b"]), tokens).square().mean()
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in adapter.parameters())])


def main(folder, compile, checkpointing, backend):
    torch.set_num_threads(1)
    base = Flux.from_pretrained(folder, dtype="float32", max_t5_tokens=32)
    sites = base.attention_sites()
    projector = LinearProjector(feature_dim=24, context_dim=base.context_dim)
    adapter = randomise(IPAdapter(projector=projector, sites=sites), seed=5).attach(sites)
    sizes = SIZES if backend != "inductor" else SIZES[:1]
    plain = {size: loss_and_gradients(base, adapter, size) for size in sizes}
    counter = CompileCounterWithBackend(backend)
    acceleration.compiled = lambda run, cuda_graphs: compiled(run, cuda_graphs=cuda_graphs, backend=counter)
    Acceleration(compile=compile, checkpointing=checkpointing).apply(base)
    rows = []
    for size in (*sizes, sizes[0]):
        difference = loss_and_gradients(base, adapter, size) - plain[size]
        rows.append((float(difference.norm() / plain[size].norm()), counter.frame_count))
    sys.stdout.write(json.dumps({"rows": rows, "blocks": len(base.transformer.attn_processors)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
