"""References, masks, stored embeddings and augmentation: what the image encoder sees, and what is not let through."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ipa_train.data.augmentation import ReferenceAugmentation
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.image_prompts import GREY, ImagePrompts
from ipa_train.data.index import build_index
from ipa_train.data.sequential import SequentialDataModule
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.seeding import Draws
from tests.data.conftest import encode, mask, npy, paired_sample, picture, write_paired_shards, write_shard
from tests.data.http_server import http_server

COUNTS = (7, 5, 9)
AUGMENT = ReferenceAugmentation(flip_rate=0.5, max_rotation_degrees=20.0, min_crop_rate=0.5, colour_jitter=0.3)
EVERYTHING = {
    "image_prompt": "reference",
    "reference_mask": "background",
    "embedding_shape": [4],
    "reference_augment": AUGMENT,
    "crop": "random",
    "flip_rate": 0.5,
}


@pytest.fixture
def paired(tmp_path):
    return write_paired_shards(tmp_path / "paired", COUNTS)


def datamodule(shards, kind=StreamingDataModule, **options):
    defaults = {"global_batch_size": 8, "resolution": 32, "image_prompt_size": 24}
    return kind(shards=str(shards), **defaults | options)


def contents(data, steps=3, **options):
    """{position: (key, pixels, image prompt, embedding)}, and the bad samples."""
    seen, bad = {}, []
    loader = iter(data.loader(**options))
    for _ in range(steps):
        loaded = next(loader)
        bad += loaded.bad
        batch = loaded.batch
        content = batch.content
        embeddings = [None] * len(batch) if content.embeddings is None else content.embeddings.tolist()
        rows = zip(batch.keys, content.pixels.tolist(), content.image_prompts.tolist(), embeddings, strict=True)
        seen |= dict(zip(batch.positions.tolist(), rows, strict=True))
    return seen, bad


def prompt_of(image):
    """What the encoder sees of a picture as it is."""
    out = np.empty((24, 24, 3), np.uint8)
    ImagePrompts(size=24).fill(out, np.array(image), {}, flip=False, change=None)
    return out


def test_a_reference_is_what_the_encoder_sees_and_the_picture_the_target(paired):
    plain, _ = contents(datamodule(paired))
    seen, bad = contents(datamodule(paired, image_prompt="reference"))
    assert not bad
    assert len({key for key, *_ in seen.values()}) == sum(COUNTS)
    for position, (key, pixels, prompt, _) in seen.items():
        number = int(key.partition("/")[2])
        expected = prompt_of(picture(1000 + number, width=52, height=36))
        assert (np.array(prompt).transpose(1, 2, 0) == expected).all()
        assert plain[position][:2] == (key, pixels)
        assert plain[position][2] != prompt


@pytest.mark.parametrize("workers", [0, 1])
def test_embeddings_come_with_their_samples(paired, workers):
    seen, _ = contents(datamodule(paired, embedding_shape=[4], image_prompt_size=None), workers=workers)
    for key, _, _, embedding in seen.values():
        assert embedding == [float(key.partition("/")[2])] * 4


def test_everything_at_once_is_the_same_on_any_ranks_and_after_a_resume(paired):
    whole, _ = contents(datamodule(paired, **EVERYTHING), 6)
    parts = {}
    for rank in range(2):
        parts |= contents(datamodule(paired, **EVERYTHING), 3, rank=rank, world_size=2, workers=1)[0]
    data = datamodule(paired, **EVERYTHING | {"global_batch_size": 12})
    assert parts | contents(data, 2, start=np.array([24]))[0] == whole
    again = {position: row for position, row in whole.items() if position >= sum(COUNTS)}
    first = {key: prompt for position, (key, _, prompt, _) in whole.items() if position < sum(COUNTS)}
    assert any(first[key] != prompt for key, _, prompt, _ in again.values()), "another look changes it otherwise"


def test_a_target_s_flip_is_not_the_prompt_s_where_they_are_two_pictures(paired):
    still, flipped = ({"flip_rate": rate} for rate in (0.0, 1.0))
    for options, follows in (
        ({}, True),
        ({"reference_augment": ReferenceAugmentation(colour_jitter=1e-9)}, False),
        ({"image_prompt": "reference"}, False),
    ):
        before, after = (contents(datamodule(paired, **options, **flip))[0] for flip in (still, flipped))
        for position, (_, pixels, prompt, _) in before.items():
            assert (np.array(pixels)[..., ::-1] == after[position][1]).all()
            expected = np.array(prompt)[..., ::-1] if follows else np.array(prompt)
            assert np.abs(expected - after[position][2]).max() <= (1 if follows else 0)


def test_an_augmentation_changes_the_prompt_alone(paired):
    before, after = (contents(datamodule(paired, **options))[0] for options in ({}, {"reference_augment": AUGMENT}))
    for position, (key, pixels, prompt, _) in before.items():
        assert after[position][:2] == (key, pixels)
        assert after[position][2] != prompt


@pytest.mark.parametrize(
    ("options", "same"),
    [({"flip_rate": 1.0}, lambda x: x[:, ::-1]), ({"max_rotation_degrees": 1e-9}, lambda x: x)],
)
def test_each_augmentation_is_what_it_says(options, same):
    out, prompts = np.empty((24, 24, 3), np.uint8), ImagePrompts(size=24)
    whole = np.array(picture(3))
    augment = ReferenceAugmentation(**options)
    for change in augment.draw(draws(8)):
        prompts.fill(out, whole, {}, flip=False, change=change)
        assert np.abs(out.astype(int) - same(prompt_of(whole))).max() <= 1


def draws(count):
    return Draws(0, torch.arange(count))


def test_crops_stay_within_the_square_and_above_their_least_share():
    rows, columns = np.mgrid[:40, :60]
    where = np.stack([rows, columns, columns], axis=-1).astype(np.uint8)
    shares = []
    for change in ReferenceAugmentation(min_crop_rate=0.49).draw(draws(200)):
        part = change.cut(where)
        assert part.shape[0] == part.shape[1]
        assert 10 <= part[0, 0, 1] <= part[-1, -1, 1] < 50
        shares.append(len(part) / 40)
    assert min(shares) < 0.72
    assert min(shares) >= 0.7
    assert max(shares) > 0.97


def shown():
    """A white picture of 52 x 36, black where rows 10 to 19 meet columns 12 to 21."""
    picture = np.full((36, 52, 3), 255, np.uint8)
    picture[10:20, 12:22] = 0
    return picture


def masked(mask_data, **options):
    """Its prompt."""
    out = np.empty((24, 24, 3), np.uint8)
    prompts = ImagePrompts(size=24, **options)
    prompts.fill(out, shown(), {"mask": mask_data}, flip=False, change=None)
    return out


def test_background_greys_what_the_mask_does_not_keep():
    out = masked(mask(), mask="background")
    assert (out[0, 0] == GREY).all()
    assert (out[-1, -1] == GREY).all()
    assert out[10, 6].max() == 0, "kept as it is"
    whole = masked(mask(rows=slice(None), columns=slice(None)), mask="background")
    assert (whole == prompt_of(shown())).all()


def test_a_prompt_is_never_grey_alone():
    with pytest.raises(DataError, match="keeps nothing of the centre square"):
        masked(mask(columns=slice(0, 8)), mask="background")
    assert masked(mask(columns=slice(0, 8)), mask="crop").min() == 255
    out, prompts = np.empty((24, 24, 3), np.uint8), ImagePrompts(size=24, mask="background")
    for change in ReferenceAugmentation(min_crop_rate=0.1).draw(draws(200)):
        prompts.fill(out, shown(), {"mask": mask()}, flip=False, change=change)
        assert (out != GREY).any()


@pytest.mark.parametrize(("margin", "black"), [(0.0, 1.0), (0.5, 0.25)])
def test_crop_is_the_square_around_what_is_kept(margin, black):
    out = masked(mask(), mask="crop", mask_margin=margin)
    assert (out < 128).mean() == pytest.approx(black, abs=0.03)


@pytest.mark.parametrize(
    ("rows", "columns", "top", "left", "side"),
    [
        (slice(0, 3), slice(0, 3), 0, 0, 9),
        (slice(33, 36), slice(49, 52), 27, 43, 9),
        (slice(None), slice(None), 0, 8, 36),
        (slice(5, 6), slice(0, 52), 0, 8, 36),
        (slice(15, 20), slice(15, 20), 10, 10, 15),
    ],
)
def test_crop_stays_inside_the_picture(rows, columns, top, left, side):
    """Also where the mask meets an edge, or is longer than the picture is high."""
    out = masked(mask(rows=rows, columns=columns), mask="crop", mask_margin=1.0)
    assert (out == prompt_of(shown()[top : top + side, left : left + side])).all()


def colour_mask():
    return encode(picture(0, width=52, height=36), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mask(40, 52), "its mask has 52 x 40 pixels, the picture it is for 52 x 36"),
        (mask(rows=slice(0, 0)), "its mask keeps nothing: no level is above 127"),
        (encode(Image.fromarray(np.ones((36, 52), np.uint8)), "PNG"), "its mask keeps nothing"),
        (colour_mask(), "its mask is not a PNG of grey levels alone"),
        (encode(Image.new("LA", (52, 36), (255, 0)), "PNG"), "its mask is not a PNG of grey levels alone"),
        (encode(Image.new("L", (52, 36)), "PNG", transparency=0), "its mask is not a PNG of grey levels alone"),
        (encode(picture(0).convert("L")), "its mask is not a PNG of grey levels alone"),
        (mask()[:60], "its mask: cannot decode"),
    ],
)
@pytest.mark.parametrize("kind", ["background", "crop"])
def test_a_mask_that_would_mislead_is_refused(data, message, kind):
    with pytest.raises(DataError, match=message):
        masked(data, mask=kind)


@pytest.fixture
def spoilt(tmp_path):
    """Of thirty samples four lack a part, and three are bad in one."""
    samples = {f"{n:05d}": paired_sample(n) for n in range(30)}
    del samples["00000"]["ref.png"], samples["00001"]["mask.png"], samples["00002"]["npy"], samples["00003"]["txt"]
    samples["00004"]["ref.png"] = samples["00004"]["ref.png"][:500]
    samples["00005"]["mask.png"] = mask(40, 48)
    samples["00006"]["npy"] = npy(np.full(4, np.nan, np.float32))
    write_shard(tmp_path / "spoilt", 0, samples)
    return tmp_path / "spoilt"


NEEDED = {name: EVERYTHING[name] for name in ("image_prompt", "reference_mask", "embedding_shape")}
PROBLEMS = {
    "00004": "its reference: cannot decode",
    "00005": "its mask has 48 x 40",
    "00006": "its embedding is not finite",
}


def test_what_lacks_a_part_is_left_out_and_what_is_bad_in_one_replaced(spoilt, caplog):
    data = datamodule(spoilt, **NEEDED)
    with caplog.at_level("WARNING"):
        seen, bad = contents(data, 8)
    assert "4 samples without an image, a caption, KEY.ref.*, KEY.mask.png or KEY.npy are left out" in caplog.text
    assert {key.partition("/")[2] for key, *_ in seen.values()} == {f"{n:05d}" for n in range(7, 30)}
    found = {sample.key: sample.error for sample in bad}
    assert found.keys() == PROBLEMS.keys()
    assert all(found[key].startswith(message) for key, message in PROBLEMS.items())
    assert not contents(datamodule(spoilt), 4)[1], "who needs nothing of it has 29 samples, all good"
    assert build_index(str(spoilt)).counts.tolist() == [29]


def test_streams_without_an_index_are_as_strict(spoilt):
    seen, bad = contents(datamodule(spoilt, SequentialDataModule, **NEEDED), 20)
    found = {sample.key: sample.error for sample in bad}
    lacking = "is without an image, a caption, KEY.ref.*, KEY.mask.png or KEY.npy"
    assert {key for key, error in found.items() if error == lacking} == {"00000", "00001", "00002", "00003"}
    assert all(found[key].startswith(message) for key, message in PROBLEMS.items())
    indexed = {key: rest for key, *rest in contents(datamodule(spoilt, **NEEDED), 8)[0].values()}
    assert {key: rest for key, *rest in seen.values()} == indexed


def test_remote_shards_give_the_same(paired, tmp_path):
    local, _ = contents(datamodule(paired, **NEEDED))
    with http_server(paired) as server:
        places = {"index_dir": str(tmp_path / "index"), "cache_dir": str(tmp_path / "cache")}
        for _ in range(2):
            remote, bad = contents(datamodule(f"{server.url}/{{00000..00002}}.tar", **places, **NEEDED))
            assert not bad
            assert remote == local


def test_masks_of_references_are_not_used_for_pictures(tmp_path):
    """Also where both happen to be of one size."""
    write_shard(tmp_path, 0, {f"{n}": paired_sample(n) | {"mask.png": mask(40, 48)} for n in range(9)})
    with pytest.raises(
        ConfigError, match=r"data\.reference_mask=crop: .*00000\.tar has KEY\.ref\.\*, and masks are of"
    ):
        _ = datamodule(tmp_path, reference_mask="crop").stream
    streamed = datamodule(tmp_path, SequentialDataModule, reference_mask="crop", num_workers=0)
    with pytest.raises(DataError, match=r"its mask is of its KEY\.ref\.\*: set data\.image_prompt=reference"):
        contents(streamed, 1)


def test_shards_without_what_is_needed_are_refused_by_name(shards):
    with pytest.raises(
        DataError, match=r"00000\.tar: no sample with both an image .* and a \.txt caption and KEY\.ref\.\*"
    ):
        datamodule(shards, image_prompt="reference").prepare_data()


def test_runs_with_and_without_needs_do_not_disturb_each_other(paired):
    with_needs, without = datamodule(paired, **NEEDED), datamodule(paired)
    before = contents(with_needs, 1)[0], contents(without, 1)[0]
    rows = {path.name: path.stat().st_mtime_ns for path in paired.glob("*.idx.npy")}
    assert len(rows) == 2 * len(COUNTS)
    assert without.index.shards[0].rows().dtype.itemsize == 36
    assert (contents(datamodule(paired, **NEEDED), 1)[0], contents(datamodule(paired), 1)[0]) == before
    assert {path.name: path.stat().st_mtime_ns for path in paired.glob("*.idx.npy")} == rows


def test_a_resume_with_other_needs_is_refused_by_what_is_needed(paired):
    saved = {"version": 3, **datamodule(paired, **NEEDED)._order, "positions": [16], "step": 2}
    datamodule(paired, **NEEDED).load_state_dict(saved)
    with pytest.raises(DataError, match=r"needs nothing but its picture of each.*KEY\.ref\.\* and KEY\.mask\.png and"):
        datamodule(paired).load_state_dict(saved)
    older = {name: value for name, value in saved.items() if name != "extras"}
    with pytest.raises(DataError, match=r"needs KEY\.npy of each sample.*use the old data\.image_prompt, data\.ref"):
        datamodule(paired, embedding_shape=[4]).load_state_dict(older)
    allowed = datamodule(paired, allow_index_change=True)
    allowed.load_state_dict(saved)
    assert allowed.positions.tolist() == [16]


def test_references_of_two_kinds_are_a_key_that_comes_twice(tmp_path):
    write_shard(tmp_path, 0, {"a": paired_sample(0) | {"ref.jpg": encode(picture(0))}})
    with pytest.raises(DataError, match="the key 'a' appears twice"):
        build_index(str(tmp_path), extras=["reference"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_prompt": "refrence"}, r"data\.image_prompt='refrence' is no choice. Did you mean 'reference'"),
        ({"reference_mask": "face"}, r"data\.reference_mask='face' is no choice"),
        ({"reference_mask_margin": -1.0}, r"data\.reference_mask_margin must be from 0 to 10, got -1"),
        ({"embedding_shape": []}, r"data\.embedding_shape must be \(f,\) or \(s, f\)"),
        ({"image_prompt": "reference", "image_prompt_size": None}, "encoder of this run sees no pictures"),
    ],
)
def test_options_that_cannot_be_are_one_line(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        datamodule(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_rate": 2.0}, r"data\.reference_augment\.flip_rate must be from 0 to 1, got 2"),
        ({"max_rotation_degrees": -5.0}, r"max_rotation_degrees must be from 0 to 180, got -5"),
        ({"min_crop_rate": 0.0}, r"min_crop_rate must be above 0 and at most 1, got 0"),
        ({"colour_jitter": 1.5}, r"colour_jitter must be from 0 to 1, got 1\.5"),
    ],
)
def test_augmentations_that_cannot_be_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message):
        replace(ReferenceAugmentation(), **options)
