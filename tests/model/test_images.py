"""Encoded bytes to arrays and back: every kind of image file, and what is refused.

Shapes: H x W pixels, K classes.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.decode import measure
from repsep_model import images as images_module
from repsep_model import tiff_bands
from repsep_model.image_files import TiffFile
from repsep_model.images import (
    ImageError,
    UInt8,
    decode_image,
    decode_mask,
    encode_grey,
    encode_mask,
    image_size,
    overlay,
)
from repsep_model.labels import IGNORE_INDEX
from tests.bad_images import header_only_png
from tests.image_writers import tiff

COLOURS = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200), (250, 250, 0)]


def picture(height: int = 24, width: int = 40) -> UInt8:
    """A smooth ramp, which JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def ids_up_to(largest: int) -> UInt8:
    ids: UInt8 = np.random.default_rng(0).integers(0, largest + 1, (21, 33)).astype(np.uint8)
    ids[0, 0] = largest
    return ids


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_unchanged(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(picture()), kind, **options)), picture())


def test_decoded_image_is_writable_rgb() -> None:
    image = decode_image(encoded(Image.fromarray(picture())))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = picture()
    # What a camera stores so that the orientation turns it back to upright, after the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif.tobytes(), **options)
    decoded = decode_image(data)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() < 12
    assert image_size(data) == upright.shape[:2]


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    decoded = decode_image(data)
    assert decoded.shape == picture().shape
    assert np.abs(decoded.astype(int) - picture()).mean() < 6


def test_16_bit_grey_keeps_its_high_byte() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(decoded, np.array([0, 0, 1, 128, 255], np.uint8)[None, :, None].repeat(3, axis=2))


def test_grey_is_repeated_over_the_channels() -> None:
    grey = picture()[..., 0]
    np.testing.assert_array_equal(decode_image(encode_grey(grey)), grey[..., None].repeat(3, axis=2))


def test_palette_is_looked_up() -> None:
    ids = ids_up_to(4)
    np.testing.assert_array_equal(decode_image(encode_mask(ids, COLOURS)), np.array(COLOURS, np.uint8)[ids])


def test_palette_with_transparency_is_looked_up_without_a_warning() -> None:
    ids = ids_up_to(4)
    image = Image.open(io.BytesIO(encode_mask(ids, COLOURS)))
    data = encoded(image, transparency=bytes([0, 100, 255]))
    np.testing.assert_array_equal(decode_image(data), np.array(COLOURS, np.uint8)[ids])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_and_colours_stay(mode: str) -> None:
    colour = picture() if mode == "RGBA" else picture()[..., :1]
    alpha = np.zeros((*colour.shape[:2], 1), np.uint8)
    decoded = decode_image(encoded(Image.fromarray(np.concatenate([colour, alpha], axis=2), mode)))
    np.testing.assert_array_equal(decoded, np.broadcast_to(colour, decoded.shape))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_image_is_an_image_error(kind: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * keep)])


def test_size_of_a_truncated_png_is_an_image_error() -> None:
    """Its EXIF may stand after the pixels, so they are read."""
    data = encoded(Image.fromarray(picture(60, 80)))
    with pytest.raises(ImageError, match="PNG cannot be decoded"):
        image_size(data[: len(data) // 2])


@pytest.mark.parametrize("decode", [decode_image, decode_mask, image_size])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the object is empty"),
        (b"<html>403</html>", "not an image that Pillow can read"),
        (b"\x89PNG", "not an image"),
    ],
)
def test_bytes_that_are_no_image_are_an_image_error(decode: Any, data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(data)


def test_image_over_the_limit_is_refused_before_its_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(picture(24, 40)))
    assert decode_image(data, max_pixels=960).shape == (24, 40, 3)
    monkeypatch.setattr(Image.Image, "convert", lambda *_args: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="40 x 24 pixels are over the limit of 959"):
        decode_image(data, max_pixels=959)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_our_limit_holds_above_pillows_own_without_a_warning(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(picture(24, 40)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500 if kind in ("WEBP", "GIF") else 100)  # these ask for twice it
    assert decode_image(data, max_pixels=960).shape == (24, 40, 3)
    with pytest.raises(ImageError, match="40 x 24 pixels are over the limit of 959"):
        decode_image(data, max_pixels=959)


@pytest.mark.parametrize("decode", [image_size, decode_mask])
def test_a_bomb_is_refused_wherever_pixels_would_be_loaded(decode: Any) -> None:
    with pytest.raises(ImageError, match="30000 x 30000 pixels are over the limit"):
        decode(header_only_png(30_000, 30_000))


def test_programs_that_pillow_would_start_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS, whatever it is called, runs Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *_args, **_more: pytest.fail("started"))
    with pytest.raises(ImageError, match="PostScript, which is not taken"):
        decode_image(encoded(Image.fromarray(picture()), "EPS"))


def tiff_kinds() -> dict[str, bytes]:
    """One of every layout that is split: strips, tiles, one strip, compressions, depths, byte orders."""
    image = picture(150, 210)
    sixteen = (image.astype(np.uint16) << 8) + 77
    kinds = {
        "strips": tiff(image),
        "big-endian": tiff(sixteen, order=">"),
        "deflate": tiff(image, deflate=True),
        "tiles": tiff(image, tile=32),
        "deflated tiles": tiff(image, tile=64, deflate=True, order=">"),
        "BigTIFF": tiff(image, tile=16, big=True),
        "planes": tiff(image, planar=True),
        "one strip": tiff(image, rows_per_strip=150),
        "one strip of 16 bits": tiff(sixteen, rows_per_strip=150),
        "bits in reverse": tiff(
            np.packbits(image[..., 0] > 99, axis=1), {256: (4, [210]), 258: (3, [1]), 266: (3, [2])}
        ),
        "on its side": tiff(image, {274: (3, [6])}),
        "on its side, deflated tiles": tiff(image, {274: (3, [7])}, tile=64, deflate=True),
    }
    colours = Image.fromarray(image)
    for mode in ("L", "P", "CMYK", "RGBA", "RGB", "1"):
        options: dict[str, Any] = {"tiffinfo": {278: 16}}
        kinds[f"LZW {mode}"] = encoded(colours.convert(mode), "TIFF", compression="tiff_lzw", **options)
        kinds[f"plain {mode}"] = encoded(colours.convert(mode), "TIFF", **options)
    kinds["predictor"] = encoded(colours, "TIFF", compression="tiff_lzw", tiffinfo={278: 16, 317: 2})
    kinds["JPEG"] = encoded(colours, "TIFF", compression="jpeg", tiffinfo={278: 16})
    kinds["fax"] = encoded(colours.convert("1"), "TIFF", compression="group4", tiffinfo={278: 16})
    return kinds


@pytest.mark.parametrize("kind", tiff_kinds())
def test_a_tiff_decoded_piece_by_piece_equals_the_same_decoded_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiff_kinds()[kind]
    whole = decode_image(data)
    loaded: list[int] = []
    load = TiffFile.load
    monkeypatch.setattr(TiffFile, "load", lambda self: loaded.append(self.height) or load(self))
    monkeypatch.setattr(images_module, "LARGE", 150 * 210 - 1)
    monkeypatch.setattr(tiff_bands, "PIECE_PIXELS", 5000)
    np.testing.assert_array_equal(decode_image(data), whole)
    assert (max(loaded) < 75) == (kind != "planes"), "the page was decoded in one piece"


def test_a_tiff_cut_in_its_last_piece_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "LARGE", 0)
    monkeypatch.setattr(tiff_bands, "PIECE_PIXELS", 5000)
    for data in (tiff(picture(150, 210)), tiff(picture(150, 210), tile=64, deflate=True)):
        with pytest.raises(ImageError, match="TIFF cannot be decoded"):
            decode_image(data[:-1])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_an_image_converted_in_bands_equals_the_same_converted_at_once(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Image.fromarray(picture(50, 70))
    image = Image.fromarray(picture()[..., 0].astype(np.uint16) * 256) if mode == "I;16" else shown.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG", exif=exif.tobytes())
    at_once = decode_image(data)
    monkeypatch.setattr(images_module, "BAND_PIXELS", 7 * 70)
    np.testing.assert_array_equal(decode_image(data), at_once)


@pytest.mark.parametrize(("kind", "bytes_a_pixel"), [("JPEG", 7), ("TIFF", 6)])
def test_decoding_a_large_image_peaks_at_pillows_buffer_and_the_result(
    kind: str, bytes_a_pixel: float, tmp_path: Path
) -> None:
    """Pillow's 4 bytes and our 3; a TIFF in strips takes the file, here 3 bytes a pixel, and our 3."""
    side = 4200
    assert side * side > images_module.LARGE
    for name, size in (("small", (8, 8)), ("large", (side, side))):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", size, (200, 90, 10)), kind))
    least = measure(tmp_path / "small")[3]  # 1.5 more for bands: a copy of the whole would be 3
    assert measure(tmp_path / "large")[3] - least < (bytes_a_pixel + 1.5) * side * side


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"subsampling": 0}])
def test_a_jpeg_cut_and_ended_properly_is_refused_too(options: dict[str, Any], share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise[..., 0])):
        data = encoded(image, "JPEG", **options)
        assert np.abs(decode_image(data).astype(int) - np.array(image.convert("RGB"))).mean() < 80
        with pytest.raises(ImageError, match="its scan ends before the last pixel"):
            decode_image(data[: int(len(data) * share)] + b"\xff\xd9")


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_grey_in_its_last_corner_is_whole(progressive: bool) -> None:
    image = picture()
    image[12:] = 128
    for shown in (Image.fromarray(image), Image.fromarray(image[..., 0])):
        for options in ({}, {"restart_marker_blocks": 2}):
            data = encoded(shown, "JPEG", quality=95, subsampling=0, progressive=progressive, **options)
            assert (decode_image(data)[-8:] == 128).all()
            assert (decode_image(data + b"\xff\xd9 more") == decode_image(data)).all()


def test_a_changed_byte_in_a_png_is_always_noticed() -> None:
    data = encoded(Image.fromarray(picture()))
    whole = decode_image(data)
    for at in range(41, len(data) - 16):
        for bit in (1, 128):
            changed = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            with pytest.raises(ImageError):
                decode_image(changed)
    np.testing.assert_array_equal(decode_image(data), whole)


def test_twelve_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 15, 16, 2048, 4095, 4095]], np.uint16)
    packed = bytes(
        byte for a, b in values.reshape(-1, 2).tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255)
    )
    data = tiff(np.frombuffer(packed, np.uint8)[None], {256: (3, [6]), 258: (3, [12])})
    assert decode_image(data)[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


def test_mask_is_turned_as_its_tiff_tag_says() -> None:
    ids = ids_up_to(200)
    np.testing.assert_array_equal(decode_mask(tiff(np.rot90(ids, 1), {274: (3, [6])})), ids)


@pytest.mark.parametrize("largest", [1, 4, 15, 16, 17, 254, IGNORE_INDEX])
@pytest.mark.parametrize("classes", [1, 2, 5, 16, 17, 255])
def test_mask_comes_back_with_the_same_ids_whatever_the_palettes_length(classes: int, largest: int) -> None:
    ids = ids_up_to(largest)
    ids[1] = IGNORE_INDEX
    data = encode_mask(ids, [(i, 0, 255 - i) for i in range(classes)])
    np.testing.assert_array_equal(decode_mask(data), ids)


def test_mask_is_an_8_bit_indexed_png_with_the_class_colours() -> None:
    data = encode_mask(ids_up_to(4), COLOURS)
    assert data[24] == 8, "bit depth"
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == ("PNG", "P")
        palette = image.getpalette()
    assert palette is not None
    assert palette[:15] == [channel for colour in COLOURS for channel in colour]


def test_palette_covers_every_id_of_the_mask() -> None:
    """A PNG with an index beyond its palette is invalid: some readers refuse it."""
    with Image.open(io.BytesIO(encode_mask(ids_up_to(IGNORE_INDEX), COLOURS))) as image:
        palette = image.getpalette()
    assert palette is not None
    assert len(palette) == 3 * 256


def test_the_same_ids_give_the_same_bytes_whatever_their_memory_layout() -> None:
    ids = ids_up_to(4)
    assert encode_mask(np.asfortranarray(ids), COLOURS) == encode_mask(ids.copy(), COLOURS)


def test_grey_mask_is_read_as_ids() -> None:
    ids = ids_up_to(IGNORE_INDEX)
    np.testing.assert_array_equal(decode_mask(encode_grey(ids)), ids)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_mask_with_more_than_one_8_bit_channel_is_refused(mode: str) -> None:
    shape = {"RGB": (4, 5, 3), "RGBA": (4, 5, 4), "LA": (4, 5, 2), "I;16": (4, 5)}[mode]
    array = np.zeros(shape, np.uint16 if mode == "I;16" else np.uint8)
    with pytest.raises(ImageError, match=f"one 8-bit channel of class ids, this one is {mode}"):
        decode_mask(encoded(Image.fromarray(array)))


def test_truncated_mask_is_an_image_error() -> None:
    data = encode_mask(ids_up_to(200), COLOURS)
    with pytest.raises(ImageError, match="PNG cannot be decoded"):
        decode_mask(data[: len(data) // 2])


def test_overlay_blends_by_opacity_and_leaves_ids_without_a_colour_bare() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    out = overlay(image, np.array([[1, 4, IGNORE_INDEX]], np.uint8), COLOURS, opacity=0.5)
    assert out.dtype == np.uint8
    assert out[0].tolist() == [[150, 50, 50], [175, 175, 50], [100, 100, 100]]


def test_decoding_gives_no_warning_for_ordinary_files() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK"):
            kind = "TIFF" if mode == "CMYK" else "PNG"
            assert decode_image(encoded(Image.fromarray(picture()).convert(mode), kind)).shape == picture().shape
