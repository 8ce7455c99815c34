"""Pixels, compared with Pillow step by step as torchvision takes it, and every kind of image that is not RGB."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldrld_jax.data.augment import generator
from ldrld_jax.data.decode import BrokenImageError, open_image, pixels
from ldrld_jax.data.rand_augment import OPERATIONS, RandAugment
from ldrld_jax.data.views import AsStored, CentreCrop, Fitted, RandomResizedCrop, RandomRotation, crop_box
from tests.data.images import encoded, jpeg, photograph

BILINEAR = Image.Resampling.BILINEAR


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (500, 333), (231, 300), (257, 256), (100, 97), (640, 480)])
def test_evaluation_is_pillows_resize_and_centre_crop(size, rng):
    """Equal to the last bit: torchvision's Resize(256) and CenterCrop(224) call Pillow in the same way."""
    data = jpeg(rng, *size)
    image = decoded(data)
    width, height = size
    scaled = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    left, top = round((scaled[0] - 224) / 2.0), round((scaled[1] - 224) / 2.0)
    expected = image.resize(scaled, BILINEAR).crop((left, top, left + 224, top + 224))
    np.testing.assert_array_equal(CentreCrop(256, 224)(data), np.asarray(expected))


@pytest.mark.parametrize("resize", range(17, 25))
def test_an_image_below_the_crop_lies_where_torchvisions_padding_puts_it(resize, rng):
    """Expects torchvision's padding: (crop - side) // 2 pixels left and above, the rest right and below."""
    data = jpeg(rng, 57, 40)
    scaled = np.asarray(decoded(data).resize((resize * 57 // 40, resize), BILINEAR))
    height, width = scaled.shape[:2]
    pads = [((32 - side) // 2, (33 - side) // 2) if side < 32 else (0, 0) for side in (height, width)]
    padded = np.pad(scaled, [*pads, (0, 0)])
    top, left = (round((side - 32) / 2.0) for side in padded.shape[:2])
    np.testing.assert_array_equal(CentreCrop(resize, 32)(data), padded[top : top + 32, left : left + 32])


def test_a_fitted_image_is_its_middle_and_one_that_fits_is_untouched(rng):
    data = jpeg(rng, 200, 90)
    middle = decoded(data).resize((32, 32), BILINEAR, box=(55, 0, 145, 90))
    np.testing.assert_array_equal(Fitted((32, 32, 3))(data), np.asarray(middle))
    np.testing.assert_array_equal(Fitted((90, 200, 3))(data), np.asarray(decoded(data)))


def test_a_training_crop_is_pillows_crop_and_resize(rng):
    view = RandomResizedCrop(64)
    for index in range(20):
        data = jpeg(rng, 160, 120)
        left, top, width, height = crop_box(generator(0, 0, index), 160, 120, area=view.area, ratio=view.ratio)
        if min(width, height) < 128:  # larger crops are decoded at half the size
            expected = decoded(data).crop((left, top, left + width, top + height)).resize((64, 64), BILINEAR)
            np.testing.assert_array_equal(view(data, generator(0, 0, index)), np.asarray(expected))


def test_a_large_jpeg_is_decoded_at_part_of_its_size(rng, monkeypatch):
    """Decodes half the pixels a side, for nearly the same crop."""
    data = jpeg(rng, 1000, 750)
    loaded = []
    monkeypatch.setattr(
        "ldrld_jax.data.views.pixels", lambda image, **k: loaded.append(image.size) or pixels(image, **k)
    )
    view = RandomResizedCrop(96, area=(0.5, 1.0))
    small = view(data, generator(0, 0, 1)).astype(int)
    left, top, width, height = crop_box(generator(0, 0, 1), 1000, 750, area=view.area, ratio=view.ratio)
    full = decoded(data).crop((left, top, left + width, top + height)).resize((96, 96), BILINEAR)
    assert loaded[0] in ((250, 188), (125, 94), (500, 375))
    assert np.abs(small - np.asarray(full)).mean() < 3


def test_crop_boxes_lie_inside_and_have_the_published_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng, 500, 375, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (boxes >= 0).all()
    assert (left + width <= 500).all()
    assert (top + height <= 375).all()
    area, ratio = width * height / (500 * 375), width / height
    assert area.min() > 0.078
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    # An area a fits with the ratio r where a <= r * 375 / 500; the mean over log-uniform ratios is .432.
    assert abs(np.mean(area) - 0.432) < 0.01
    assert left.min() == 0
    assert (left + width).max() == 500


@pytest.mark.parametrize(("size", "expected"), [((900, 30), (430, 0, 40, 30)), ((30, 900), (0, 430, 30, 40))])
def test_an_image_too_long_for_any_crop_gives_its_middle(size, expected):
    assert crop_box(np.random.default_rng(0), *size, area=(0.9, 1.0), ratio=(3 / 4, 4 / 3)) == expected


def test_a_random_view_depends_on_seed_epoch_and_index_alone(rng):
    data, view = jpeg(rng), RandomResizedCrop(32)
    for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]:
        assert (view(data, generator(*key)) != view(data, generator(0, 0, 0))).any()
        np.testing.assert_array_equal(view(data, generator(*key)), view(data, generator(*key)))


def test_a_rotation_is_pillows(rng):
    data = jpeg(rng, 64, 64)
    view = RandomRotation(AsStored((64, 64, 3)), 20.0)
    angle = generator(0, 0, 5).uniform(-20, 20)
    np.testing.assert_array_equal(view(data, generator(0, 0, 5)), np.asarray(decoded(data).rotate(angle)))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_any_number_of_channels_is_rotated_alike(channels, rng):
    image = rng.integers(0, 256, (9, 7, channels), np.uint8)
    turned = RandomRotation(AsStored((9, 7, channels)), 20.0)(image, generator(0, 0, 5))
    angle = generator(0, 0, 5).uniform(-20, 20)
    for channel in range(channels):
        expected = Image.fromarray(np.ascontiguousarray(image[..., channel])).rotate(angle)
        np.testing.assert_array_equal(turned[..., channel], np.asarray(expected))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_distortion_keeps_size_and_mode_and_grows_with_its_strength(name, mode, rng):
    image = photograph(rng, 64, 48).convert(mode)
    results = [OPERATIONS[name](image, strength) for strength in (0.0, 0.3, 0.9, -0.9)]
    assert {(result.size, result.mode) for result in results} == {((64, 48), mode)}
    none, little, much, _ = (np.abs(np.asarray(r, int) - np.asarray(image, int)).mean() for r in results)
    if name in ("auto_contrast", "equalize", "identity"):
        assert none == little == much
    else:
        assert none == 0
    if name not in ("auto_contrast", "equalize", "identity", "colour") or (name, mode) == ("colour", "RGB"):
        assert little < much


def test_rand_augment_distorts_as_its_generator_says(rng):
    data, view = jpeg(rng), RandAugment(RandomResizedCrop(32), operations=2, magnitude=9)
    plain = [RandomResizedCrop(32)(data, generator(0, 0, i)) for i in range(8)]
    distorted = [view(data, generator(0, 0, i)) for i in range(8)]
    assert sum((a != b).any() for a, b in zip(plain, distorted, strict=True)) >= 6
    np.testing.assert_array_equal(view(data, generator(0, 0, 3)), distorted[3])
    assert view.shape == distorted[0].shape == (32, 32, 3)


@pytest.fixture
def picture(rng):
    return photograph(rng, 48, 32)


def rgb(data: bytes, **options) -> np.ndarray:
    return np.asarray(pixels(open_image(data), channels=3, exif=True)).astype(int)


def test_grey_palette_and_cmyk_become_colour(picture):
    colour = np.asarray(picture).astype(int)
    grey = np.asarray(picture.convert("L")).astype(int)
    np.testing.assert_array_equal(rgb(encoded(picture.convert("L"), "png")), np.stack([grey] * 3, -1))
    assert np.abs(rgb(encoded(picture.quantize(256), "png")) - colour).mean() < 6
    assert np.abs(rgb(encoded(picture.convert("CMYK"), "jpeg", quality=95)) - colour).mean() < 6
    np.testing.assert_array_equal(pixels(open_image(encoded(picture, "png")), channels=1, exif=True), grey)


def test_transparency_lies_on_white(picture):
    """Ignores the colour stored under a transparent pixel."""
    transparent = picture.convert("RGBA")
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:, :10] = 0
    transparent.putalpha(Image.fromarray(alpha))
    result = rgb(encoded(transparent, "png"))
    assert (result[:, :10] == 255).all()
    np.testing.assert_array_equal(result[:, 10:], np.asarray(picture)[:, 10:])


def test_sixteen_bits_are_scaled_not_clipped(picture):
    grey = np.asarray(picture.convert("L"))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode.startswith("I;16")
    np.testing.assert_array_equal(rgb(encoded(sixteen, "png"))[..., 0], grey)


def grey_png(pixels, bits, transparent) -> bytes:
    """Returns a PNG of one row of grey pixels of so many bits, one of which is transparent."""
    samples = np.unpackbits(np.array(pixels, ">u2").view(np.uint8)).reshape(-1, 16)[:, -bits:]
    row = b"\0" + np.packbits(samples.reshape(-1)).tobytes()
    header = struct.pack(">IIBBBBB", len(pixels), 1, bits, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(("bits", "grey"), [(2, 85), (4, 17), (8, 1), (16, 0)])
@pytest.mark.parametrize("transparent", [0, 1])
def test_a_transparent_grey_of_any_depth_lies_on_white(bits, grey, transparent):
    found = rgb(grey_png([0, 1, 2**bits - 1], bits, transparent))[0, :, 0]
    np.testing.assert_array_equal(found, [255 if transparent == 0 else 0, 255 if transparent == 1 else grey, 255])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_white_is_0_is_no_negative(dtype):
    most = np.iinfo(dtype).max
    data = encoded(Image.fromarray(np.array([[0, most, most // 5]], dtype)), "tiff")
    photometric = struct.pack("<HHIHH", 0x0106, 3, 1, 1, 0)
    assert data.count(photometric) == 1
    white_is_0 = data.replace(photometric, struct.pack("<HHIHH", 0x0106, 3, 1, 0, 0))
    np.testing.assert_array_equal(rgb(data)[0, :, 0], [0, 255, 51])
    np.testing.assert_array_equal(rgb(white_is_0)[0, :, 0], [255, 0, 204])


def test_an_array_without_pixels_is_no_image():
    with pytest.raises(BrokenImageError, match=r"not an image \(uint8 \(0, 5, 3\)\)"):
        open_image(np.zeros((0, 5, 3), np.uint8))


def test_floats_have_no_range_and_are_refused(picture):
    with pytest.raises(BrokenImageError, match="mode F: only 8-bit and 16-bit"):
        rgb(encoded(picture.convert("F"), "tiff"))


def test_exif_turns_the_image_and_its_size(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    data = encoded(picture, "jpeg", quality=95, exif=exif)
    assert rgb(data).shape == (48, 32, 3)
    assert np.abs(rgb(data) - np.asarray(picture.rotate(-90, expand=True))).mean() < 6
    assert AsStored((48, 32, 3))(data).shape == (48, 32, 3)
    assert AsStored((32, 48, 3), exif=False)(data).shape == (32, 48, 3)
    assert RandomResizedCrop(8)(data, generator(0, 0, 0)).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_truncated_image_is_broken(picture, kind):
    data = encoded(picture, kind)
    for view in (CentreCrop(16, 16), AsStored((32, 48, 3)), RandomResizedCrop(16)):
        for keep in (len(data) * 3 // 4, len(data) // 2, 30, 0):
            with pytest.raises(BrokenImageError):
                view(data[:keep], generator(0, 0, 0))


def test_another_size_than_the_others_is_broken(picture):
    with pytest.raises(BrokenImageError, match="48x32 pixels, the others have 32x32"):
        AsStored((32, 32, 3))(encoded(picture, "png"))
