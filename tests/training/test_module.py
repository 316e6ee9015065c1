"""The training step: what it sees is what inference will see, and only the adapter learns."""

from functools import partial

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from ipa_train.acceleration import Acceleration
from ipa_train.bases import StableDiffusion
from ipa_train.conditioning import ConditionDropout
from ipa_train.diffusion import Objective
from tests.training.conftest import make_batch


def gradients(module):
    return [p.grad.clone() for p in module.adapter.parameters()]


def test_loss_does_not_depend_on_how_a_batch_is_cut(make_module):
    """Draws are keyed by position, so micro-batches, ranks and workers do not change the mathematics."""
    module = make_module()
    module.training_step(make_batch(range(8)), 0).backward()
    whole = gradients(module)
    module.zero_grad()
    losses = [module.training_step(make_batch(part), 0) for part in ([0, 5, 2], [7, 1], [3, 4, 6])]
    (sum(loss * n for loss, n in zip(losses, (3, 2, 3), strict=True)) / 8).backward()
    for a, b in zip(whole, gradients(module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_dropped_conditions_reach_the_denoiser_as_no_condition(make_module):
    """With everything dropped, neither captions nor image prompts matter; with nothing dropped, both do."""

    def loss(rate, batch):
        return make_module(dropout=ConditionDropout(text_rate=0.0, image_rate=0.0, both_rate=rate)).training_step(
            batch, 0
        )

    batch = make_batch(range(4))
    other = make_batch(range(4))
    object.__setattr__(other, "captions", ["something else"] * 4)
    object.__setattr__(other.content, "separate_prompts", 255 - other.content.separate_prompts)
    assert torch.equal(loss(1.0, batch), loss(1.0, other))
    assert not torch.equal(loss(0.0, batch), loss(0.0, other))


def test_only_the_adapter_learns_and_is_saved(make_module):
    module = make_module()
    frozen = {
        name: weight.clone()
        for part in (module.base, module.image_encoder)
        for name, weight in part.state_dict(prefix=type(part).__name__).items()
    }
    before = {name: weight.clone() for name, weight in module.adapter.state_dict().items()}
    batches = DataLoader([make_batch(range(4 * i, 4 * i + 4)) for i in range(2)], batch_size=None)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    for part in (module.base, module.image_encoder):
        assert not any(m.training for m in part.modules())
        for name, weight in part.state_dict(prefix=type(part).__name__).items():
            assert torch.equal(weight, frozen[name]), name
    changed = [not torch.equal(weight, before[name]) for name, weight in module.adapter.state_dict().items()]
    assert all(changed)
    assert set(module.state_dict()) == {f"adapter.{name}" for name in before}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_bf16_base_with_fp32_masters_follows_fp32(make_module, tiny_models, checkpointing):
    exact = make_module()
    exact.training_step(make_batch(range(4)), 0).backward()
    module = make_module(base=StableDiffusion.from_pretrained(str(tiny_models[0])))
    Acceleration(checkpointing=checkpointing).apply(module.base)
    module.training_step(make_batch(range(4)), 0).backward()
    assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}
    flat, flat_exact = (torch.cat([g.flatten() for g in gradients(m)]) for m in (module, exact))
    assert torch.nn.functional.cosine_similarity(flat, flat_exact, dim=0) > 0.99


def test_sample_grids_follow_an_objective_that_changes_the_schedule(make_module, tiny_sd21):
    """The denoiser must meet each timestep at the noise it is trained with, and begin at noise alone."""
    for zero in (True, False):
        base = StableDiffusion.from_pretrained(str(tiny_sd21[0]))
        module = make_module(base=base, objective=partial(Objective, zero_terminal_snr=zero))
        for sampler in (base.sampler(5, (4, 4)), base.pipeline().scheduler):
            torch.testing.assert_close(
                sampler.alphas_cumprod, module.objective.schedule.alphas_cumprod, rtol=1e-3, atol=1e-6
            )
            sampler.set_timesteps(5)
            assert (sampler.timesteps[0] == 999) == zero
