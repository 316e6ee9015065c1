"""The adapter is found in what Tencent's training scripts leave behind."""

import pytest
import torch
from safetensors.torch import save_file

from ipa_train.cli.main import main
from ipa_train.errors import ExportError
from ipa_train.export import describe, read_adapter_file, to_interchange
from ipa_train.export.file import nested


@pytest.fixture
def dump(base, make_adapter):
    """The tensors of such a training, each attention weight under both of its names; and the adapter's own."""
    state = to_interchange(make_adapter("plus"), base.attention_sites())
    tensors = {f"unet.{name}": weight for name, weight in base.unet.state_dict().items()}
    for name, weight in state.items():
        part, _, rest = name.partition(".")
        tensors[f"{'image_proj_model' if part == 'image_proj' else 'adapter_modules'}.{rest}"] = weight
    for site in base.attention_sites():
        for part in ("to_k_ip", "to_v_ip"):
            key = f"ip_adapter.{site.index}.{part}.weight"
            tensors[f"unet.{site.name}.processor.{part}.weight"] = state[key]
    return tensors, state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_whole_dump(dump, tmp_path, caplog):
    tensors, state = dump
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same(read_adapter_file(tmp_path / "pytorch_model.bin")[0], state)
    assert "ipa export" in caplog.text


def test_dump_that_lost_one_of_two_names(dump, tmp_path):
    """What safetensors leaves of it: the reports of an empty ip_adapter."""
    tensors, state = dump
    left = {name: weight.contiguous() for name, weight in tensors.items() if not name.startswith("adapter_modules.")}
    save_file(left, tmp_path / "model.safetensors")
    assert same(read_adapter_file(tmp_path / "model.safetensors")[0], state)


def test_export_makes_an_adapter_file_of_it(dump, tmp_path, capsys):
    tensors, state = dump
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert main(["export", str(tmp_path / "pytorch_model.bin"), "--dtype", "fp32", "--out", str(tmp_path / "out")]) == 0
    assert "diffusers: loads" in capsys.readouterr().out
    assert same(read_adapter_file(tmp_path / "out" / "ip_adapter.safetensors")[0], state)
    assert same(read_adapter_file(tmp_path / "out" / "ip_adapter.bin")[0], state)


def test_flat_bin_is_read_and_said_to_be_no_good_elsewhere(dump, tmp_path, caplog):
    _, state = dump
    torch.save(state, tmp_path / "flat.bin")
    assert same(read_adapter_file(tmp_path / "flat.bin")[0], state)
    assert "without the two parts" in caplog.text


def test_a_file_with_adapter_modules_in_place_of_ip_adapter(dump, tmp_path, caplog):
    """As Kolors' FaceID-Plus has it."""
    _, state = dump
    parts = nested(state)
    torch.save({"image_proj": parts["image_proj"], "adapter_modules": parts["ip_adapter"]}, tmp_path / "x.bin")
    assert same(read_adapter_file(tmp_path / "x.bin")[0], state)
    assert "adapter_modules in place of ip_adapter" in caplog.text


def test_tensors_at_any_depth_are_seen_and_refused_by_name(dump, tmp_path):
    _, state = dump
    torch.save(nested(state) | {"optimizer": {"state": {"exp_avg": torch.zeros(2)}}}, tmp_path / "x.bin")
    with pytest.raises(ExportError, match=r"optimizer\.state\.exp_avg has no place"):
        describe(read_adapter_file(tmp_path / "x.bin")[0], source="x")


def test_a_bin_in_torchs_older_format_is_read(dump, tmp_path):
    _, state = dump
    torch.save(nested(state), tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert same(read_adapter_file(tmp_path / "x.bin")[0], state)
