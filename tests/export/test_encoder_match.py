"""An adapter file and an image encoder that do not belong together are refused, and told apart by what differs."""

import json

import pytest

from ipa_train.bases.tiny_encoders import tiny_dino
from ipa_train.conditioning import DinoImageEncoder, FaceImageEncoder, StoredEmbeddings
from ipa_train.errors import ExportError
from ipa_train.export.warm_start import check_image_encoder


@pytest.fixture
def load_dino(tmp_path):
    tiny_dino().save_pretrained(tmp_path / "dino")

    def load(**options):
        return DinoImageEncoder.from_pretrained(str(tmp_path / "dino"), dtype="float32", **{"image_size": 32} | options)

    return load


def check(trained_with, encoder):
    check_image_encoder({"image_encoder": json.dumps(trained_with)}, encoder, source="f")


def refused(trained_with, encoder, message):
    with pytest.raises(ExportError, match=message) as error:
        check(trained_with, encoder)
    assert "\n" not in str(error.value)


def test_the_same_model_read_otherwise_is_another_encoder(load_dino):
    identity = load_dino().identity()
    check(identity, load_dino())
    refused(identity, load_dino(layer=-1), r"'dino' \(layer -2\), not with 'dino' \(layer -1\)")
    refused(identity, load_dino(image_size=48), r"\(image_size 32\), not with 'dino' \(image_size 48\)")
    refused(identity | {"preprocessing": "padded"}, load_dino(), r"\(preprocessing padded\), not with .*ImageNet mean")
    refused(identity | {"class": "X"}, load_dino(), r"\(class X\), not with 'dino' \(class Dinov2Model\)")
    refused(identity, StoredEmbeddings(), r"weights [0-9a-f]{12}, .*not with 'arcface' \(weights None")


def test_files_of_before_are_compared_by_what_they_say(load_dino):
    identity = load_dino().identity()
    old = {key: identity[key] for key in ("name", "weights_sha256", "image_size", "preprocessing")}
    check(old, load_dino(layer=-1))
    refused(old | {"weights_sha256": "0" * 64}, load_dino(), r"'dino' \(weights 000000000000\), not with 'dino'")


def test_stored_embeddings_are_compared_by_name_and_sizes(tiny_models):
    trained = StoredEmbeddings(dim=8, name="arcface").identity()
    check(trained, StoredEmbeddings(dim=8, name="arcface"))
    for option in ({"name": "adaface"}, {"dim": 9}, {"normalize": True}, {"num_tokens": 1}):
        refused(trained, StoredEmbeddings(**{"dim": 8, "name": "arcface"} | option), "trained with the image encoder")
    face = FaceImageEncoder.from_pretrained(str(tiny_models[1]), dim=8)
    check(face.identity(), face)
    other = FaceImageEncoder.from_pretrained(str(tiny_models[1]), dim=8, name="adaface")
    refused(face.identity(), other, "'arcface'.*not with .*'adaface'")
    refused(face.identity(), face.clip, r"embedding \{'name': 'arcface'.*embedding None")
