"""Which pictures are evaluated, with which captions."""

import json

import pytest
from PIL import Image

from ipa_train.errors import ConfigError
from ipa_train.eval.captions import fingerprint, missing, read_pictures


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def coco(tmp_path, names=("c.png", "a.jpg"), captions=None):
    """Annotations with two captions for each picture; ids fall as names come."""
    rows = [{"id": 100 - i, "file_name": name} for i, name in enumerate(names)]
    if captions is None:
        captions = [
            {"id": 10 * row["id"] + k, "image_id": row["id"], "caption": f" {row['file_name']} {k} "}
            for k in (1, 0)
            for row in rows
        ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": rows, "annotations": captions}))
    return path


def test_of_several_captions_the_one_of_the_lowest_id_counts(images, tmp_path):
    pictures = read_pictures(images, coco(tmp_path))
    assert [(p.id, p.path.name, p.caption) for p in pictures] == [
        ("99", "a.jpg", "a.jpg 0"),
        ("100", "c.png", "c.png 0"),
    ]


def test_a_plain_folder_has_its_captions_beside_the_pictures(images):
    for name in "abc":
        (images / f"{name}.txt").write_text(f"a picture of {name}\n")
    (images / "notes.md").write_text("no picture")
    pictures = read_pictures(images)
    assert [(p.id, p.caption) for p in pictures] == [(name, f"a picture of {name}") for name in "abc"]


def test_a_data_set_is_the_same_wherever_it_lies(images, tmp_path):
    annotations = coco(tmp_path)
    moved = images.rename(tmp_path / "moved")
    before, after = read_pictures(moved, annotations), read_pictures(moved.rename(images), annotations)
    assert fingerprint(before) == fingerprint(after)
    assert fingerprint(after) != fingerprint(after[:1])


def test_pictures_that_are_not_there_are_counted(images, tmp_path):
    pictures = read_pictures(images, coco(tmp_path, ("c.png", "gone.jpg")))
    assert [p.path.name for p in missing(pictures)] == ["gone.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "captions.json: cannot be read: No such file"),
        ("{", "captions.json: cannot be read: "),
        ("[]", "not in COCO's format of captions"),
        ('{"images": [{"id": 1}], "annotations": []}', "1 of its 1 images have no caption, e.g. 1"),
        ('{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]}', "not in COCO's format"),
        ('{"images": [], "annotations": []}', "no pictures in it"),
    ],
)
def test_annotations_that_are_none_are_refused(content, message, images, tmp_path):
    if content is not None:
        (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_pictures(images, tmp_path / "captions.json")


def test_folders_that_lack_something_are_refused(images, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_pictures(tmp_path / "nowhere")
    (images / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"2 of 3 pictures have no caption beside them, e.g. no b\.txt"):
        read_pictures(images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no pictures in it"):
        read_pictures(tmp_path / "empty")
    Image.new("RGB", (8, 8)).save(images / "a.png")
    for name in "bc":
        (images / f"{name}.txt").write_text("a")
    with pytest.raises(ConfigError, match="more than one picture is called a"):
        read_pictures(images)
