"""FaceID-Plus and PlusV2 have the same tensors: what is known of a file's version is kept, and held against a run's."""

import pytest

from ipa_train.adapter import FacePlusProjector, IPAdapter
from ipa_train.bases import adapter_sites
from ipa_train.bases.tiny import randomise
from ipa_train.cli.main import main
from ipa_train.conditioning import FaceImageEncoder
from ipa_train.errors import ExportError
from ipa_train.export import read_adapter_file, write_export
from ipa_train.export.file import face_plus_v2
from ipa_train.export.warm_start import init_from


@pytest.fixture
def make_adapter(base):
    def make(*, shortcut):
        sizes = {"feature_dim": 8, "hidden_dim": 40, "context_dim": base.context_dim, "shortcut": shortcut}
        sites = adapter_sites(base, lora_rank=4)
        return randomise(IPAdapter(projector=FacePlusProjector(**sizes), sites=sites), seed=5), sites

    return make


@pytest.fixture
def make_file(make_adapter, tmp_path):
    """A function from a file's name and metadata to a file."""

    def make(name, **metadata):
        paths = write_export(tmp_path / "made", *make_adapter(shortcut=True), metadata=metadata)
        path = tmp_path / name
        (written,) = [p for p in paths if p.suffix == path.suffix]
        return written.rename(path)

    return make


@pytest.mark.parametrize(
    ("name", "metadata", "version"),
    [
        ("ip-adapter-faceid-plusv2_sd15.bin", {}, True),
        ("ip-adapter-faceid-plus_sd15.bin", {}, False),
        ("mine.safetensors", {"shortcut": True}, True),
        ("ip-adapter-faceid-plusv2_sd15.safetensors", {"shortcut": False}, False),
        ("mine.safetensors", {"shortcut": "yes"}, None),
        ("mine.bin", {}, None),
    ],
)
def test_a_warm_start_as_the_other_version_is_refused(
    name, metadata, version, make_file, make_adapter, tiny_models, caplog
):
    path = make_file(name, **metadata)
    assert face_plus_v2(path, read_adapter_file(path)[1]) is version
    assert ("does not say whether" in caplog.text) == (version is None)
    encoder = FaceImageEncoder.from_pretrained(str(tiny_models[1]), dtype="float32", dim=8)
    for shortcut in (False, True):
        adapter, sites = make_adapter(shortcut=shortcut)
        if version in (None, shortcut):
            init_from(adapter, sites, path, encoder)
        else:
            wanted = "faceid_plus_v2" if version else "faceid_plus"
            with pytest.raises(ExportError, match=rf"{name}: this is a {wanted}, .*: choose adapter={wanted}\.$"):
                init_from(adapter, sites, path, encoder)


def test_an_export_keeps_what_the_name_of_the_file_said(make_file, tmp_path):
    path = make_file("ip-adapter-faceid-plusv2_sd15.bin")
    assert main(["export", str(path), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out" / "ip_adapter.safetensors"
    assert face_plus_v2(out, read_adapter_file(out)[1]) is True
