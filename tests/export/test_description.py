"""Recognising adapters: whole ones, incomplete ones, and kinds that are read elsewhere."""

import pytest
import torch

from ipa_train.adapter import FaceProjector, LinearProjector, MLPProjector, Resampler
from ipa_train.errors import ExportError
from ipa_train.export import describe, loadability, require_loadable, to_interchange
from ipa_train.export.description import AdapterDescription
from ipa_train.export.layouts import projector_names


@pytest.fixture
def make_state(base, make_adapter):
    return lambda variant, **options: to_interchange(make_adapter(variant, **options), base.attention_sites())


def test_sizes_are_told_from_the_tensors(make_state):
    linear, plus, full = (describe(make_state(v), source="x") for v in ("linear", "plus", "full"))
    assert (linear.variant, linear.feature_dim, linear.num_tokens) == ("linear", 24, 4)
    assert (plus.variant, plus.feature_dim, plus.num_tokens) == ("plus", 40, 16)
    assert (plus.resampler_dim, plus.resampler_heads) == (64, 12)
    assert (full.variant, full.feature_dim, full.num_tokens, full.resampler_dim) == ("full", 40, None, None)
    for found in (linear, plus, full):
        assert found.context_dim == 64
        assert found.site_dims[1] == 16
        assert found.site_dims[31] == 64
        assert list(found.site_dims) == list(range(1, 32, 2))


@pytest.mark.parametrize("variant", ["linear", "plus", "full"])
def test_a_file_with_any_tensor_missing_is_refused(variant, make_state):
    state = make_state(variant)
    for name in state:
        with pytest.raises(ExportError, match=r"^here: "):
            describe({other: weight for other, weight in state.items() if other != name}, source="here")


@pytest.mark.parametrize("variant", ["linear", "plus", "full"])
def test_a_file_with_any_tensor_of_another_shape_is_refused(variant, make_state):
    state = make_state(variant)
    for name, weight in state.items():
        for wrong in (torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.cat([weight, weight])):
            with pytest.raises(ExportError, match=r"^here: "):
                describe(state | {name: wrong}, source="here")


def test_a_tensor_too_many_is_refused_by_name(make_state):
    """diffusers would ignore these, and compute something else than what was trained."""
    for name in ("image_proj.pos_emb.weight", "image_proj.layers.4.0.to_q.weight", "ip_adapter.1.to_k_ip.bias"):
        with pytest.raises(ExportError, match=f"{name} has no place in a plus adapter"):
            describe(make_state("plus") | {name: torch.zeros(64, 64)}, source="x")


def test_instantx_flux_is_told_by_its_sizes_and_loaded_by_none():
    """Of InstantX/FLUX.1-dev-IP-Adapter: 57 blocks without biases, 128 tokens of SigLIP's pooled embedding."""
    with torch.device("meta"):
        projector = FaceProjector(feature_dim=1152, context_dim=4096, num_tokens=128)
        state = {f"image_proj.{name}": weight for name, weight in interchange(projector).items()}
        for n in range(57):
            state |= {f"ip_adapter.{n}.to_{part}_ip.weight": torch.empty(3072, 4096) for part in "kv"}
    found = describe(state, source="x")
    assert (found.family, found.variant, found.feature_dim) == ("instantx_flux", "instantx", 1152)
    assert (found.num_tokens, found.num_parameters) == (128, 2_645_600_512)
    assert not any(verdict.ok for verdict in loadability(found))


# Cross-attentions of the released files: (first number, last number, width).
SD15 = [(1, 3, 320), (5, 7, 640), (9, 17, 1280), (19, 23, 640), (25, 29, 320), (31, 31, 1280)]
SDXL = [(1, 7, 640), (9, 107, 1280), (109, 119, 640), (121, 139, 1280)]


@pytest.mark.parametrize(
    ("projector", "options", "sites", "parameters", "takers"),
    [
        (LinearProjector, {"feature_dim": 1024, "context_dim": 768}, SD15, 22_319_616, "dct"),
        (Resampler, {"feature_dim": 1280, "context_dim": 768}, SD15, 49_087_488, "dct"),
        (MLPProjector, {"feature_dim": 1280, "context_dim": 768}, SD15, 21_794_304, "dct"),
        (LinearProjector, {"feature_dim": 1280, "context_dim": 2048}, SDXL, 351_285_248, "dct"),
        (LinearProjector, {"feature_dim": 1024, "context_dim": 2048}, SDXL, 349_188_096, "dct"),
        (Resampler, {"feature_dim": 1280, "context_dim": 2048, "dim": 1280, "heads": 20}, SDXL, 423_748_864, "dct"),
        (Resampler, {"feature_dim": 1024, "context_dim": 2048}, SDXL, 165_765_120 + 340_787_200, "d"),  # Kolors
    ],
)
def test_released_sizes_are_recognised(projector, options, sites, parameters, takers):
    """The sizes of the files of h94/IP-Adapter and of Kolors, and how many parameters each has."""
    with torch.device("meta"):
        projector = projector(**options)
        state = {f"image_proj.{name}": weight for name, weight in interchange(projector).items()}
        for first, last, width in sites:
            for n in range(first, last + 1, 2):
                for part in ("to_k_ip", "to_v_ip"):
                    state[f"ip_adapter.{n}.{part}.weight"] = torch.empty(width, options["context_dim"])
    found = describe(state, source="x")
    assert found.variant == projector.variant
    assert found.num_parameters == parameters
    assert {name: getattr(found, name) for name in ("feature_dim", "context_dim")}.items() <= options.items()
    assert "".join(v.loader[0].lower() for v in loadability(found) if v.ok) == takers


def interchange(projector):
    weights = projector.state_dict()
    return {theirs: weights[ours] for ours, theirs in projector_names(projector).items()}


def of_size(variant="plus", context_dim=768, tokens=16, dim=None, heads=12, numbers=(1, 3, 5)):
    plus = variant == "plus"
    return AdapterDescription(
        family="unet",
        variant=variant,
        feature_dim=1280,
        hidden_dim=None,
        lora_rank=0,
        context_dim=context_dim,
        num_tokens=tokens,
        resampler_dim=(dim or context_dim) if plus else None,
        resampler_heads=heads if plus else None,
        site_dims=dict.fromkeys(numbers, 320),
        num_parameters=1,
    )


@pytest.mark.parametrize(
    ("adapter", "takers", "reason"),
    [
        (of_size("linear", tokens=4), "dct", ""),
        (of_size("linear", tokens=8), "t", "linear adapters of 4 tokens only, not 8"),
        (of_size("full", tokens=None), "dct", ""),
        (of_size("full", tokens=None, context_dim=2048), "dt", "no full adapters for SDXL"),
        (of_size(), "dct", ""),
        (of_size(context_dim=1024), "dct", ""),
        (of_size(tokens=32), "dt", "plus adapters of 16 tokens only, not 32"),
        (of_size(heads=16), "d", "width 768 with 12 heads, and this one has width 768 with 16"),
        (of_size(context_dim=2048, dim=1280, heads=20), "dct", ""),
        (of_size(context_dim=2048, dim=1280), "d", "width 1280 with 20 heads"),
        (of_size(context_dim=2048, heads=20), "d", "takes a resampler of width 2048 for Kolors"),
        (of_size(numbers=(3, 5, 7)), "", "sites numbered 1, 3, 5"),
        (of_size(numbers=(1, 5)), "", "sites numbered 1, 3, 5"),
    ],
)
def test_who_loads_what(adapter, takers, reason):
    verdicts = loadability(adapter)
    assert "".join(v.loader[0].lower() for v in verdicts if v.ok) == takers
    assert any(reason in r for v in verdicts for r in v.reasons) or not reason


def test_what_diffusers_cannot_load_is_refused():
    require_loadable(of_size(), source="here")
    with pytest.raises(ExportError, match=r"^here: diffusers would not load this adapter: .* 4 tokens only, not 8"):
        require_loadable(of_size("linear", tokens=8), source="here")
