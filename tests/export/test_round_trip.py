"""Released layouts: said what they are, trained on from, and written back equal to the bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipa_train.adapter import FacePlusProjector, FaceProjector, IPAdapter, LinearProjector, Resampler, TimeResampler
from ipa_train.bases import load_base
from ipa_train.bases.tiny import randomise, save_tiny_models
from ipa_train.cli.main import main
from ipa_train.export import from_interchange, read_adapter_file, to_interchange
from ipa_train.export.file import nested
from ipa_train.export.xlabs import to_xlabs
from tests.official import official_sites


def released(projector, base, *, dtype=torch.float16, lora_rank=0, **sizes):
    """An interchange state of the official sizes in which every number is 0: what it is made of, and no memory."""
    with torch.device("meta"):
        sites = official_sites(base, lora_rank=lora_rank)
        adapter = IPAdapter(projector=projector(context_dim=sites[0].context_dim, **sizes), sites=sites)
    state = to_interchange(adapter, sites)
    return {name: torch.zeros((), dtype=dtype).expand(weight.shape) for name, weight in state.items()}


KINDS = {
    "sd15 linear": (LinearProjector, "sd15", {"feature_dim": 1024}, "SD 1.x", "22,319,616"),
    "sdxl plus": (Resampler, "sdxl", {"feature_dim": 1280, "dim": 1280, "heads": 20}, "SDXL or Kolors", "423,748,864"),
    "faceid": (FaceProjector, "sd15", {"feature_dim": 512, "lora_rank": 128}, "SD 1.x", "48,354,816"),
    "portrait": (FaceProjector, "sd15", {"feature_dim": 512, "num_tokens": 16}, "SD 1.x", None),
    "faceid plus": (
        FacePlusProjector,
        "sdxl",
        {"feature_dim": 512, "hidden_dim": 1280, "lora_rank": 128},
        "SDXL or Kolors",
        "743,707,648",
    ),
    "sd3.5 large": (TimeResampler, "sd3", {"feature_dim": 1152}, "SD 3.5 large", "797,925,888"),
    "flux": (LinearProjector, "flux_dev", {"feature_dim": 768}, "Flux", "490,874,880"),
    "flux v2": (LinearProjector, "flux_dev", {"feature_dim": 768, "num_tokens": 16}, "Flux", "528,672,768"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_import_says_what_a_released_file_is(kind, tmp_path, capsys, monkeypatch):
    projector, base, sizes, family, parameters = KINDS[kind]
    state = released(projector, base, **sizes)
    monkeypatch.setattr("ipa_train.cli.import_.read_adapter_file", lambda path: (state, {}))  # gigabytes otherwise
    assert main(["import", str(tmp_path / "file.bin")]) == 0
    shown = capsys.readouterr().out
    assert family in shown
    assert projector.variant in shown
    assert parameters is None or parameters in shown
    assert any(
        line.split()[:2] == ["diffusers", "loads"] or ("diffusers" in line and "loads" in line)
        for line in shown.splitlines()
    )
    assert ("LoRA" in shown) == ("lora_rank" in sizes)


@pytest.fixture
def flux_state(flux):
    torch.manual_seed(0)
    projector = LinearProjector(feature_dim=24, context_dim=flux.context_dim)
    adapter = randomise(IPAdapter(projector=projector, sites=flux.attention_sites()), seed=5)
    return {name: weight.to(torch.bfloat16) for name, weight in to_interchange(adapter, flux.attention_sites()).items()}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_xlabs_files_are_read_and_written_back_to_the_bit(suffix, flux_state, flux, tmp_path, caplog):
    theirs, path = to_xlabs(flux_state), tmp_path / f"ip_adapter.{suffix}"
    save_file(theirs, path) if suffix == "safetensors" else torch.save(theirs, path)
    state, _ = read_adapter_file(path)
    projector = LinearProjector(feature_dim=24, context_dim=flux.context_dim)
    adapter = IPAdapter(projector=projector, sites=flux.attention_sites())
    from_interchange(state, adapter, flux.attention_sites(), source="x")
    assert not caplog.text
    words = ["export", str(path), "--layout", "xlabs", "--dtype", "bf16", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    back = load_file(tmp_path / "out" / "ip_adapter.safetensors")
    assert list(tmp_path.joinpath("out").iterdir()) == [tmp_path / "out" / "ip_adapter.safetensors"]
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_file_trained_on_from_is_written_back_to_the_bit(family, tmp_path):
    """fp16 file -> fp32 masters -> fp16 file."""
    base = load_base(str(save_tiny_models(tmp_path, family)[0]), dtype="float32")
    sites = base.attention_sites()
    sizes = {"feature_dim": 24, "context_dim": base.context_dim}

    def adapter():
        projector = (
            TimeResampler(**sizes, dim=64, heads=1, num_tokens=8) if family == "sd3" else LinearProjector(**sizes)
        )
        return IPAdapter(projector=projector, sites=sites)

    theirs = {name: w.half() for name, w in to_interchange(randomise(adapter(), seed=9), sites).items()}
    torch.save(nested(theirs), tmp_path / "released.bin")
    mine = adapter()
    from_interchange(read_adapter_file(tmp_path / "released.bin")[0], mine, sites, source="x")
    assert all(torch.equal(w.half(), theirs[name]) for name, w in to_interchange(mine, sites).items())


def test_xlabs_layout_of_another_family_is_refused(base, tmp_path, capfd):
    projector, sites = LinearProjector(feature_dim=24, context_dim=base.context_dim), base.attention_sites()
    path = tmp_path / "unet.safetensors"
    save_file(to_interchange(IPAdapter(projector=projector, sites=sites), sites), path)
    assert main(["export", str(path), "--layout", "xlabs", "--out", str(tmp_path / "out")]) == 2
    assert "--layout xlabs is for adapters of Flux" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
