"""Geometry as the reference tools have it, and no picture is half decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from ipa_train.data.decode import Decoder, decode, decode_image, fill_image_prompt, stored_size
from ipa_train.errors import DataError
from tests.data.conftest import encode

SIZES = [(640, 480), (480, 640), (513, 700), (300, 211), (1001, 333), (224, 224)]


def photo(width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def png(image):
    return encode(image, "PNG")


def decode_at(data, *, resolution=64, image_prompt_size=32, **options):
    """(pixels, image prompt, placement) of one picture."""
    size = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    pixels = np.empty((*size, 3), np.uint8)
    prompt = np.empty((image_prompt_size, image_prompt_size, 3), np.uint8)
    placement, picture = Decoder()(data, pixels=pixels, **options)
    fill_image_prompt(prompt, picture, flip=options.get("flip", False), max_pixels=10**8)
    return pixels, prompt, placement


def levels(a, b):
    return np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64))


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_resize_and_centre_crop(size):
    image = photo(*size)
    pixels, _, placement = decode_at(png(image), resolution=256)
    short = min(size)
    width, height = (int(256 * side / short) for side in size)
    left, top = round((width - 256) / 2), round((height - 256) / 2)
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + 256, top + 256)))
    difference = levels(pixels, expected)
    assert difference.mean() < 0.1
    assert difference.max() <= 2
    assert placement.original_size == (size[1], size[0])
    assert placement.crop_top_left == (top, left)


@pytest.mark.parametrize("size", SIZES)
def test_image_prompt_is_clip_image_processor(size):
    image = photo(*size)
    _, prompt, _ = decode_at(png(image), image_prompt_size=224)
    processor = CLIPImageProcessorPil(do_normalize=False, do_rescale=False)
    expected = processor(image, return_tensors="np").pixel_values[0]
    difference = levels(prompt.transpose(2, 0, 1), expected)
    assert difference.mean() < 0.1
    assert difference.max() <= 4


@pytest.mark.parametrize("bucket", [(192, 320), (320, 192), (256, 256), (64, 128)])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (320, 192), (192, 320), (1001, 333)])
def test_a_bucket_is_covered_and_cropped(bucket, size):
    """Nothing is stretched: the crop is a part of the picture at one scale, and as much of it as fits."""
    image = photo(*size)
    pixels, _, placement = decode_at(png(image), resolution=bucket)
    if size[0] / size[1] < bucket[1] / bucket[0]:
        height, width = int(size[1] * bucket[1] / size[0]), bucket[1]
    else:
        height, width = bucket[0], int(size[0] * bucket[0] / size[1])
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - bucket[0]) / 2), round((width - bucket[1]) / 2)
    expected = np.asarray(whole.crop((left, top, left + bucket[1], top + bucket[0])))
    assert levels(pixels, expected).mean() < 0.1
    assert levels(pixels, expected).max() <= 2
    assert placement.crop_top_left == (top, left)
    assert 0 in placement.crop_top_left


def test_what_is_stored_at_its_size_is_not_touched():
    image = photo(128, 64)
    pixels, _, placement = decode_at(png(image), resolution=(64, 128))
    assert (pixels == np.asarray(image)).all()
    pixels, _, placement = decode_at(png(image), resolution=64)
    assert (pixels == np.asarray(image)[:, 32:96]).all()
    assert placement.crop_top_left == (0, 32)


def test_crops_and_flips():
    data = png(photo(300, 200))
    corners = [decode_at(data, crop_at=at)[2].crop_top_left for at in ((0, 0), (0, 0.5), (0, 0.9999))]
    assert corners == [(0, 0), (0, 16), (0, 32)]
    plain, flipped = decode_at(data), decode_at(data, flip=True)
    assert levels(flipped[1][:, ::-1], plain[1]).max() <= 1
    assert levels(flipped[0][:, ::-1], plain[0]).max() <= 1


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_sizes_are_read_from_the_header(format_):
    image = photo(60, 40)
    assert stored_size(encode(image, format_)[: None if format_ == "WEBP" else 3000]) == (40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    assert stored_size(encode(image, format_, exif=exif)) == (60, 40)
    assert stored_size(b"\xff\xd8 nothing") == (0, 0)


def test_all_modes_become_upright_rgb():
    image = photo(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    turned = decode_image(encode(image, exif=exif), max_pixels=10**6)
    assert turned.size == (40, 60)
    assert decode_image(encode(image.convert("CMYK")), max_pixels=10**6).mode == "RGB"
    assert decode_image(encode(image.convert("L")), max_pixels=10**6).mode == "RGB"
    assert decode_image(encode(image, "WEBP", lossless=True), max_pixels=10**6).tobytes() == image.tobytes()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode_image(png(clear), max_pixels=100).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_levels():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(png(Image.fromarray(ramp)), max_pixels=1000))
    assert (decoded[..., 0] == ramp >> 8).all()


EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("RGB", {"exif": EXIF}), ("CMYK", {})])
def test_damage_inside_a_jpeg_is_noticed(mode, options):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (150, 200, 3), dtype=np.uint8)).convert(mode)
    data = encode(noise, **options)
    accepted = 0  # a JPEG has no checksum: now and then damage reads as other, valid codes
    for at in rng.integers(len(data) // 2, len(data) - 1100, 40):
        try:
            decode_image(data[:at] + bytes(1000) + data[at + 1000 :], max_pixels=10**6)
            accepted += 1
        except DataError:
            pass
    assert accepted <= 2, "of 40; a lenient decoder accepts all"


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_whatever_is_damaged_nothing_but_data_errors_come_out(format_):
    whole = encode(photo(48, 36), format_, exif=EXIF)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for at in rng.integers(2, len(data), 4):
            data[at] = rng.integers(256)
        try:
            assert decode_image(bytes(data), max_pixels=10**6).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("side", [8_000, 10_000, 30_000, 2**31 - 1])
def test_a_png_bomb_is_refused_by_its_header(side):
    data = bytearray(png(Image.new("RGB", (16, 16))))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError, match=r"above data\.max_pixels|decompression bomb"):
        decode_image(bytes(data), max_pixels=50_000_000)


@pytest.mark.parametrize("side", [8_000, 16_384])
def test_a_webp_bomb_is_refused_by_its_header(side):
    data = bytearray(encode(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    assert data[20] == 0x2F, "the mark of a lossless picture; its sides follow, less 1, in 14 bits each"
    data[21:25] = struct.pack("<I", side - 1 | side - 1 << 14)
    with pytest.raises(DataError, match=r"above data\.max_pixels|decompression bomb"):
        decode_image(bytes(data), max_pixels=50_000_000)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_errors(format_):
    data = encode(photo(200, 150), format_)
    for share in (0.1, 0.5, 0.9, 0.99):
        with pytest.raises(DataError, match="cannot decode"):
            decode_image(data[: int(len(data) * share)], max_pixels=10**6)


def test_a_bomb_is_refused_by_its_header():
    data = bytearray(encode(Image.new("RGB", (16, 16))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)

    with pytest.raises(DataError, match=r"claims 30000 x 30000 pixels, above data\.max_pixels"):
        decode_image(bytes(data), max_pixels=50_000_000)


def test_a_strip_that_would_be_huge_when_resized_is_refused():
    with pytest.raises(DataError, match=r"would, resized, have 48000 x 64 pixels, above data\.max_pixels=100000"):
        Decoder(max_pixels=100_000)(png(Image.new("RGB", (1500, 2))), pixels=np.empty((64, 64, 3), np.uint8))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"not a picture", b"\xff\xd8" + b"\0" * 600])
def test_what_is_no_picture_is_an_error(data):
    with pytest.raises(DataError, match="cannot decode"):
        decode_image(data, max_pixels=10**6)


def test_gif_and_others_are_not_opened():
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "GIF")
    with pytest.raises(DataError, match="cannot decode: it is no JPEG, PNG or WebP"):
        decode_image(buffer.getvalue(), max_pixels=100)


@pytest.mark.parametrize(
    ("size", "smaller"), [((640, 480), (160, 120)), ((300, 211), (150, 106)), ((100, 90), (100, 90))]
)
def test_thumbnails_are_the_same_picture_and_as_strict(size, smaller):
    image = photo(*size)
    data = encode(image, quality=95)
    found = decode(data, max_pixels=10**6, min_size=100)
    assert found.shape[:2] == smaller[::-1]
    assert levels(found, image.resize(smaller, Image.Resampling.BOX)).mean() < 4
    assert decode(png(image), max_pixels=10**6, min_size=100).shape[:2] == size[::-1]
    with pytest.raises(DataError, match="cannot decode"):
        decode(data[: len(data) // 2], max_pixels=10**6, min_size=100)
