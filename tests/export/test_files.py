"""Files: both layouts, both ways, bit for bit; and what is refused."""

import json
import os
import stat

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases.unet import unet_attention_sites
from ipa_train.cli.main import main
from ipa_train.errors import ExportError
from ipa_train.export import describe, read_adapter_file, to_interchange, write_export
from ipa_train.export.warm_start import init_from
from tests.official import SD15_UNET


@pytest.mark.parametrize("variant", ["linear", "plus", "full"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_round_trip_is_bit_equal(variant, suffix, base, image_encoder, make_adapter, tmp_path):
    sites, adapter = base.attention_sites(), make_adapter(variant)
    write_export(tmp_path, adapter, sites, metadata={"image_encoder": image_encoder.identity()})
    fresh = make_adapter(variant)
    for weight in fresh.parameters():
        weight.data.zero_()
    init_from(fresh, sites, tmp_path / f"ip_adapter.{suffix}", image_encoder)
    for name, weight in adapter.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], weight), name
    write_export(tmp_path / "again", fresh, sites, metadata={"image_encoder": image_encoder.identity()})
    assert (tmp_path / "ip_adapter.bin").read_bytes() == (tmp_path / "again" / "ip_adapter.bin").read_bytes()


def test_layout_is_that_of_the_released_files(base, make_adapter, tmp_path):
    safetensors, bin_ = write_export(tmp_path, make_adapter("plus"), base.attention_sites(), dtype="fp16")
    flat, nested = load_file(safetensors), torch.load(bin_, weights_only=True)
    assert list(nested) == ["image_proj", "ip_adapter"]
    assert {f"{part}.{name}" for part in nested for name in nested[part]} == set(flat)
    assert flat["ip_adapter.31.to_k_ip.weight"].shape == (64, 64), "31 is the middle block"
    assert "image_proj.layers.3.1.3.weight" in flat
    assert {w.dtype for w in flat.values()} == {torch.float16}
    for path in (safetensors, bin_):
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_full_size_files_have_the_released_sizes(tmp_path):
    with torch.device("meta"):
        sites = unet_attention_sites(UNet2DConditionModel(**SD15_UNET))
        adapter = IPAdapter(projector=LinearProjector(feature_dim=1024, context_dim=768), sites=sites)
    adapter.to_empty(device="cpu").load_state_dict({k: torch.zeros(v.shape) for k, v in adapter.state_dict().items()})
    for dtype, megabytes in (("fp16", 44.6), ("fp32", 89.3)):
        for path in write_export(tmp_path, adapter, sites, dtype=dtype):
            assert path.stat().st_size / 1e6 == pytest.approx(megabytes, abs=0.1)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_never_run(tmp_path):
    torch.save({"image_proj": {"x": Payload(tmp_path / "owned")}, "ip_adapter": {}}, tmp_path / "bad.bin")
    with pytest.raises(ExportError, match=r"bad\.bin: holds more than tensors, and is not unpickled"):
        read_adapter_file(tmp_path / "bad.bin")
    assert not (tmp_path / "owned").exists()


def test_what_is_no_adapter_is_refused_by_name(base, make_adapter, tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.bin").write_text("hello")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    truncated = write_export(tmp_path, make_adapter("linear"), base.attention_sites())[0]
    truncated.write_bytes(truncated.read_bytes()[:-100])
    for name in ("text.safetensors", "text.bin", "ip_adapter.safetensors"):
        with pytest.raises(ExportError, match=f"{name}: damaged or no adapter file"):
            read_adapter_file(tmp_path / name)
    with pytest.raises(ExportError, match="no such file"):
        read_adapter_file(tmp_path / "nothing.bin")
    with pytest.raises(ExportError, match="no IP-Adapter: it needs"):
        describe(read_adapter_file(tmp_path / "other.safetensors")[0], source="x")


def test_a_warm_start_that_does_not_fit_says_what_would(base, image_encoder, make_adapter, tmp_path):
    sites = base.attention_sites()
    path = write_export(tmp_path, make_adapter("linear"), sites)[0]

    def refuses(adapter, message, state=None):
        if state is not None:
            save_file(state, path)
        with pytest.raises(ExportError, match=message):
            init_from(adapter, sites, path, image_encoder)

    refuses(make_adapter("plus"), "variant is linear, but this run has plus: choose adapter=linear")
    refuses(make_adapter("linear", num_tokens=8), r"num_tokens is 4, but this run has 8: set adapter\.projector")
    other = IPAdapter(projector=LinearProjector(feature_dim=99, context_dim=64), sites=sites)
    refuses(other, "feature_dim is 24, but this run has 99: choose the image_encoder whose features have width 24")
    state = to_interchange(make_adapter("linear"), sites)
    missing = {k: v for k, v in state.items() if not k.startswith("ip_adapter.7.")}
    refuses(make_adapter("linear"), r"ip_adapter\.7\.to_k_ip\.weight is missing, and .* base has width 32", missing)
    refuses(
        make_adapter("linear"),
        r"ip_adapter\.33\.to_k_ip\.weight has width 64, and that attention of this base is missing",
        state | {f"ip_adapter.33.to_{x}_ip.weight": torch.zeros(64, 64) for x in "kv"},
    )
    refuses(
        make_adapter("linear"),
        r"ip_adapter\.1\.to_k_ip\.weight has width 9, and .* base has width 16: the adapter was made for another base",
        state | {f"ip_adapter.1.to_{x}_ip.weight": torch.zeros(9, 64) for x in "kv"},
    )
    plus = to_interchange(make_adapter("plus", dim=128, heads=2), sites)
    refuses(make_adapter("plus", heads=2), r"resampler_dim is 128, but .* set adapter\.projector\.dim=128", plus)
    refuses(make_adapter("plus", dim=128), r"resampler_heads is 2, but .* set adapter\.projector\.heads=2", plus)


def test_another_image_encoder_is_refused_by_its_weights(base, image_encoder, make_adapter, tmp_path):
    sites, identity = base.attention_sites(), image_encoder.identity() | {"name": "other", "weights_sha256": "0" * 64}
    path = write_export(tmp_path, make_adapter("linear"), sites, metadata={"image_encoder": identity})[0]
    with pytest.raises(ExportError, match="trained with the image encoder 'other'"):
        init_from(make_adapter("linear"), sites, path, image_encoder)


@pytest.mark.parametrize("said", ["ViT-H", {"name": "ViT-H"}, ["ViT-H"], 5])
def test_what_others_write_into_the_metadata_stops_nothing(said, base, image_encoder, make_adapter, tmp_path, caplog):
    sites = base.attention_sites()
    path = write_export(tmp_path, make_adapter("linear"), sites, metadata={"image_encoder": said})[0]
    init_from(make_adapter("linear"), sites, path, image_encoder)
    assert "does not say in our way which image encoder" in caplog.text


def test_a_slice_of_a_larger_buffer_is_written_alone(base, make_adapter, tmp_path):
    """Sharded training keeps weights so; torch.save would write the whole buffer."""
    adapter = make_adapter("linear")
    weight = adapter.projector.proj.weight
    weight.data = torch.zeros(1_000_000)[: weight.numel()].view_as(weight)
    for path in write_export(tmp_path, adapter, base.attention_sites()):
        assert path.stat().st_size < 500_000


def test_values_that_are_not_finite_are_refused(base, make_adapter, tmp_path):
    adapter = make_adapter("linear")
    weight = adapter.projector.proj.weight.data
    weight[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"image_proj\.proj\.weight reaches 1e\+06, and fp16 ends at 65504"):
        write_export(tmp_path / "out", adapter, base.attention_sites(), dtype="fp16")
    write_export(tmp_path / "fp32", adapter, base.attention_sites())
    weight[0, 0] = torch.nan
    with pytest.raises(ExportError, match=r"image_proj\.proj\.weight is not finite"):
        write_export(tmp_path / "out", adapter, base.attention_sites())
    assert not (tmp_path / "out").exists()


def test_metadata_says_what_the_file_is(base, image_encoder, make_adapter, tmp_path, capsys):
    path = write_export(
        tmp_path,
        make_adapter("linear"),
        base.attention_sites(),
        metadata={"step": 7, "image_encoder": image_encoder.identity()},
    )[0]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "7"
    assert json.loads(metadata["image_encoder"])["projection_dim"] == 24
    assert main(["import", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("linear", "width 24", "image tokens of width 64, 16 sites", "diffusers", "loads", "step"):
        assert text in shown
