"""The blocks of style and of layout are the same in diffusers' pipelines as in the adapter's own sites."""

import pytest

from ipa_train.adapter import IPAdapter, LinearProjector, blocks
from ipa_train.bases import load_base
from ipa_train.bases.tiny import randomise
from ipa_train.eval.layers import layer_choices, layer_scale
from ipa_train.eval.pipeline import load_pipeline
from ipa_train.export import write_export


@pytest.mark.parametrize("family", ["tiny_models", "tiny_sdxl"])
@pytest.mark.parametrize("layers", ["style", "layout"])
def test_diffusers_is_told_the_same_sites(family, layers, request, tmp_path):
    path, encoder = request.getfixturevalue(family)
    base = load_base(str(path), dtype="float32")
    sites = base.attention_sites()
    adapter = randomise(
        IPAdapter(projector=LinearProjector(feature_dim=24, context_dim=base.context_dim), sites=sites), seed=5
    )
    file = write_export(tmp_path, adapter, sites, metadata={})[0]
    loaded = load_pipeline(str(path), file, str(encoder), dtype="float32", device="cpu")
    loaded.pipeline.set_ip_adapter_scale(layer_scale(loaded.base, layers, 0.5))
    processors = loaded.pipeline.unet.attn_processors
    told = {site.name: processors[f"{site.name}.processor"].scale for site in sites}
    wanted = getattr(blocks, layers)(sites, 0.5)
    assert told == {site.name: [wanted.get(site.name, 0.0)] for site in sites}
    assert 0 < len(wanted) < len(sites)


def test_bases_without_such_blocks_have_no_choice(flux, base):
    assert layer_choices(flux) == ("all",)
    assert layer_choices(base) == ("all", "style", "layout")
