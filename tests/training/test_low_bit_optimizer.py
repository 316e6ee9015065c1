"""AdamW with moments in 8 bits goes on from a checkpoint as if it had not stopped."""

import pytest
import torch

from ipa_train.training.checkpoint import AdapterCheckpointIO, checkpoint_path


def step(model, optimizer, number):
    optimizer.zero_grad()
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(number))
    model(x).square().mean().backward()
    optimizer.step()


def test_resumed_is_uninterrupted(tmp_path):
    optim = pytest.importorskip("bitsandbytes.optim", reason="an optional extra: pip install -e '.[low-bit]'")

    def new():
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 256)
        return model, optim.AdamW8bit(model.parameters(), lr=1e-3)

    model, optimizer = new()
    for number in range(3):
        step(model, optimizer, number)
    checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    path = checkpoint_path(tmp_path, 3)
    AdapterCheckpointIO().save_checkpoint(checkpoint, path)
    other, resumed = new()
    read = AdapterCheckpointIO().load_checkpoint(path)
    other.load_state_dict(read["state_dict"])
    resumed.load_state_dict(read["optimizer_states"][0])
    state = resumed.state_dict()["state"][0].values()
    assert torch.uint8 in {
        x.dtype
        for part in state
        for x in (part.values() if isinstance(part, dict) else [part])
        if isinstance(x, torch.Tensor)
    }
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, resumed, number)
    assert torch.equal(model.weight, other.weight)
