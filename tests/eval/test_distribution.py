"""FID and KID: against what they must be, and over which networks."""

import importlib.util

import pytest
import torch

from ipa_train.conditioning import DinoImageEncoder
from ipa_train.errors import ConfigError
from ipa_train.eval.distribution import FeatureNetwork, distances


def normal(count, *, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_fid_is_the_square_of_how_far_the_mean_has_moved():
    real = normal(500)
    assert distances(real, real).fid == pytest.approx(0.0, abs=1e-3)
    assert distances(real, real + 2.0).fid == pytest.approx(6 * 2.0**2, rel=1e-3)


def test_fid_of_another_spread():
    """With both covariances c and s²c: trace(c)(1 - s)²."""
    real = normal(500)
    spread = (real - real.mean(0)) * 3.0 + real.mean(0)
    trace = torch.cov(real.T).trace().item()
    assert distances(real, spread).fid == pytest.approx(trace * (1 - 3.0) ** 2, rel=1e-3)


def test_kid_tells_another_distribution_and_never_varies():
    real = normal(300)
    state = torch.get_rng_state()
    near, far = distances(real, normal(300, seed=1)), distances(real, normal(300, seed=1) + 1.0)
    assert (torch.get_rng_state() == state).all()
    torch.rand(7)
    assert far == distances(real, normal(300, seed=1) + 1.0)
    assert abs(near.kid) < 0.1 * far.kid


def test_a_single_picture_has_no_distribution():
    assert distances(normal(1), normal(4)) is None
    assert distances(normal(2), normal(4)) is not None


def test_features_are_those_of_the_network(tiny_scorers):
    pictures = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dino = DinoImageEncoder.from_pretrained(str(tiny_scorers[1]), dtype="float32")
    found = FeatureNetwork.from_pretrained(str(tiny_scorers[1]))(pictures)
    assert torch.equal(found, dino.encode(pictures, "pooled"))
    assert FeatureNetwork.from_pretrained(str(tiny_scorers[0]))(pictures).shape == (2, 24)


def test_what_is_no_network_is_named(tmp_path, tiny_models):
    with pytest.raises(ConfigError, match=r"--fid inceptoin: no model there: .* Did you mean 'inception'"):
        FeatureNetwork.from_pretrained("inceptoin")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"--fid .*: a 'bert'; give a CLIP, SigLIP, DINOv2 or DINOv3, or inception"):
        FeatureNetwork.from_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--fid .*text_encoder: .* this is a 'clip_text_model'"):
        FeatureNetwork.from_pretrained(str(tiny_models[0] / "text_encoder"))


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_the_standard_network_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"--fid inception needs torch-fidelity, .* pip install torch-fidelity"):
        FeatureNetwork.from_pretrained("inception")
