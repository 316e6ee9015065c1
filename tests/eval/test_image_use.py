"""The image-use gap: paired on fixed noise, zero for an adapter that adds nothing, and no trace of its measuring."""

import pytest
import torch

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.adapter.time_resampler import TimeResampler
from ipa_train.bases import LatentPosterior, MicroConditioning, StableDiffusion3
from ipa_train.diffusion import Objective
from ipa_train.eval.image_use import branch_ratios, make_probe, paired_interval, probe_losses, summarise


def adapter_for(base, projector=None):
    projector = projector or LinearProjector(feature_dim=24, context_dim=base.context_dim)
    return IPAdapter(projector=projector, sites=base.attention_sites()).attach(base.attention_sites())


def probe_for(base, numbers, *, num_samples=16, features=(24,)):
    """Samples of a set whose content is a function of their numbers."""
    rows = [torch.Generator().manual_seed(n) for n in numbers]
    mean = torch.stack([torch.randn(base.vae.num_channels, 4, 4, generator=g) for g in rows])
    return make_probe(
        LatentPosterior(mean, torch.full_like(mean, 0.1)),
        [torch.stack([torch.randn(features, generator=g) for g in rows])],
        [f"caption {n}" for n in numbers],
        MicroConditioning.uncropped((8, 8), len(numbers), mean.device),
        Objective(base_prediction=base.prediction_type, schedule=base.schedule),
        numbers=torch.tensor(numbers),
        num_samples=num_samples,
    )


def measure(base, adapter, probe):
    objective = Objective(base_prediction=base.prediction_type, schedule=base.schedule)
    return probe_losses(base, adapter, objective, probe, [torch.zeros(1, 24)])


T_TABLE = [(2, 12.706), (3, 4.303), (4, 3.182), (8, 2.365), (32, 2.040), (128, 1.979)]


@pytest.mark.parametrize(("n", "quantile"), T_TABLE)
def test_the_interval_is_students(n, quantile):
    differences = torch.linspace(-1, 3, n)
    interval = paired_interval(differences)
    assert interval.mean == pytest.approx(1.0)
    assert interval.half_width == pytest.approx(quantile * differences.std().item() / n**0.5, rel=8e-3)


def test_what_varies_between_samples_but_not_within_pairs_does_not_widen_the_interval():
    own = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 100
    numbers = summarise(torch.stack([own, own + 1.0, own + 2.0]), torch.arange(32) % 4)
    assert numbers["gap_other"] == pytest.approx(1.0, abs=1e-4)
    assert numbers["gap_none_t2"] == pytest.approx(2.0, abs=1e-4)
    assert max(value for name, value in numbers.items() if name.endswith("_ci")) < 1e-4
    assert numbers["loss_t1"] == pytest.approx(own[1::4].mean().item(), rel=1e-5)


def test_every_part_of_the_schedule_is_probed_once_and_alike_however_the_set_is_cut(base):
    for num_samples in (8, 20, 40):
        whole = probe_for(base, range(num_samples), num_samples=num_samples)
        parts = (whole.timesteps * num_samples // 1000).tolist()
        assert sorted(parts) == list(range(num_samples))
        assert len({part * 4 // num_samples for part in parts[:8]}) == 4, "a piece sees all quarters"
    part = probe_for(base, range(4, 8), num_samples=40)
    for name in ("noisy_latents", "target", "timesteps"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[4:8])


def test_the_losses_are_those_of_the_right_another_and_no_image(base):
    adapter, probe = adapter_for(base), probe_for(base, range(4))
    own, other, none = measure(base, adapter, probe)
    # One sample at a time, given by hand what stands in for its image.
    (features,), objective = probe.image_features, Objective(base_prediction="epsilon", schedule=base.schedule)
    for losses, stand_in in ((own, features), (other, features[[3, 0, 1, 2]]), (none, torch.zeros(4, 24))):
        with torch.no_grad():
            prediction = base.predict(
                probe.noisy_latents, probe.timesteps, base.encode_text(probe.captions), adapter(stand_in), probe.micro
            )
        assert torch.equal(losses, objective.losses(prediction, probe.target, probe.timesteps))
    assert not torch.equal(own, other)
    assert not torch.equal(own, none)


def test_an_adapter_that_adds_nothing_has_no_gap(base):
    adapter, probe = adapter_for(base), probe_for(base, range(4))
    for site in base.attention_sites():
        torch.nn.init.zeros_(adapter.branch(site).to_v_ip.weight)
    own, other, none = measure(base, adapter, probe)
    assert torch.equal(own, other)
    assert torch.equal(own, none)
    ratios = branch_ratios(base, adapter, base.attention_sites(), probe)
    assert {ratio.item() for ratio in ratios.values()} == {0.0}


def test_ratios_follow_the_weights_and_measuring_leaves_no_trace(base):
    sites = base.attention_sites()
    adapter, probe = adapter_for(base), probe_for(base, range(4))
    processors, before = [site.module.processor for site in sites], measure(base, adapter, probe)
    ratios = branch_ratios(base, adapter, sites, probe)
    assert list(ratios) == [site.name for site in sites]
    assert all(0.01 < ratio < 100 for ratio in ratios.values())
    assert [site.module.processor for site in sites] == processors
    assert torch.equal(measure(base, adapter, probe), before)
    with torch.no_grad():
        adapter.branch(sites[0]).to_v_ip.weight.mul_(3.0)
    again = branch_ratios(base, adapter, sites, probe)
    torch.testing.assert_close(again[sites[0].name], 3 * ratios[sites[0].name])


def test_ratios_of_joint_attentions(flux, tiny_sd3):
    sd3 = StableDiffusion3.from_pretrained(str(tiny_sd3), dtype="float32")
    of_sd3 = adapter_for(sd3, TimeResampler(feature_dim=24, context_dim=sd3.context_dim, dim=64, heads=1))
    of_flux = adapter_for(flux)
    for base, adapter, features in ((sd3, of_sd3, (5, 24)), (flux, of_flux, (24,))):
        sites = base.attention_sites()
        for site in sites:
            with torch.no_grad():
                adapter.branch(site).to_v_ip.weight.normal_(std=0.1)
        ratios = branch_ratios(base, adapter, sites, probe_for(base, range(4), features=features))
        assert list(ratios) == [site.name for site in sites]
        assert all(1e-4 < ratio < 100 for ratio in ratios.values())
