"""What becomes of every object that may lie in a bucket as an image, and of images cut or changed anywhere."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from repsep_model.images import ImageError, UInt8, decode_image, decode_mask, image_size
from tests.bad_images import BAD, bomb_png, encoded, frames, grey, jpeg, noisy, palette_image, picture
from tests.image_writers import bmp, png, tiff

quick = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])

WHOLE: dict[str, bytes] = {
    "JPEG": jpeg(),
    "JPEG progressive": noisy("JPEG", progressive=True),
    "JPEG with restarts": noisy("JPEG", restart_marker_blocks=2),
    "JPEG grey": encoded(grey(), "JPEG"),
    "JPEG CMYK": encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG"),
    "MPO": frames("MPO"),
    "PNG": noisy("PNG"),
    "PNG in many chunks": png(picture(), chunk=100),
    "PNG interlaced": png(picture(), interlaced=True),
    "PNG palette": encoded(palette_image(), "PNG"),
    "APNG": frames("PNG"),
    "WebP": noisy("WEBP", quality=90),
    "WebP lossless": noisy("WEBP", lossless=True),
    "WebP animated": frames("WEBP"),
    "TIFF": tiff(picture()),
    "TIFF tiles": tiff(picture(), tile=16),
    "TIFF planes": tiff(picture(), planar=True),
    "TIFF deflate": tiff(picture(), deflate=True),
    "TIFF LZW": noisy("TIFF", compression="tiff_lzw"),
    "TIFF PackBits": encoded(picture(), "TIFF", compression="packbits"),
    "TIFF JPEG": encoded(picture(), "TIFF", compression="jpeg"),
    "TIFF fax": encoded(Image.fromarray(grey() > 99), "TIFF", compression="group4"),
    "TIFF pages": frames("TIFF"),
    "BMP": bmp(picture()),
    "BMP RLE": bmp(grey(), rle=True),
    "BMP OS/2": bmp(picture(), os2=True),
    "GIF": encoded(palette_image(), "GIF"),
    "GIF animated": frames("GIF"),
}
MAGICS = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBPVP8 ", b"II*\0", b"MM\0+", b"BM", b"GIF89a", b""]


def decoded(data: bytes) -> UInt8 | None:
    """The pixels, None for an ImageError; anything else is not caught."""
    try:
        return decode_image(data, max_pixels=1_000_000)
    except ImageError:
        return None


def test_there_are_enough_kinds_of_bad_objects() -> None:
    assert sum(case.shape is None for case in BAD.values()) >= 45
    assert sum(case.shape is not None for case in BAD.values()) >= 45


@pytest.mark.parametrize("key", BAD)
def test_object_is_decoded_to_what_it_shows_or_refused_with_the_reason(key: str) -> None:
    case = BAD[key]
    if case.shape is None:
        with pytest.raises(ImageError) as refused:
            decode_image(case.data)
        assert case.reason in str(refused.value)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 300
        return
    found = decode_image(case.data)
    assert found.shape == (*case.shape, 3)
    assert found.flags.writeable
    assert found.flags.c_contiguous
    if case.tolerance is not None:
        assert np.abs(found.astype(int) - picture(*case.shape)).mean() <= case.tolerance


@pytest.mark.parametrize("key", BAD)
def test_size_by_the_header_is_that_of_the_pixels_and_nothing_but_an_image_error_is_raised(key: str) -> None:
    case = BAD[key]
    if case.shape is not None:
        assert image_size(case.data) == case.shape
    for decode in (image_size, decode_mask):
        with suppress(ImageError):
            assert decode(case.data) is not None


def test_the_bomb_is_a_whole_image_in_a_tenth_of_a_megabyte() -> None:
    """Else the limit would refuse what is harmless."""
    data = bomb_png(1000)
    assert decode_image(data).shape == (1000, 1000, 3)
    assert len(BAD["bomb.png"].data) < 150_000


@pytest.mark.parametrize("kind", WHOLE)
@quick
@given(share=st.floats(0, 1, exclude_max=True), from_end=st.integers(1, 40), near_the_end=st.booleans())
@example(share=0.5, from_end=1, near_the_end=True)
@example(share=0.5, from_end=2, near_the_end=True)
@example(share=0.5, from_end=12, near_the_end=True)
@example(share=0.5, from_end=16, near_the_end=True)
def test_an_image_cut_anywhere_is_refused_or_has_all_its_pixels(
    kind: str, share: float, from_end: int, near_the_end: bool
) -> None:
    data = WHOLE[kind]
    found = decoded(data[: len(data) - from_end] if near_the_end else data[: int(len(data) * share)])
    if found is not None:
        np.testing.assert_array_equal(found, decode_image(data))


@pytest.mark.parametrize(
    "kind", ["TIFF", "TIFF planes", "BMP", "BMP OS/2", "WebP", "WebP lossless", "JPEG", "TIFF LZW"]
)
def test_formats_whose_last_byte_is_needed_are_refused_without_it(kind: str) -> None:
    """The property above would hold of a decoder that fills up what is missing, were nothing missing to be seen."""
    assert decoded(WHOLE[kind]) is not None
    assert decoded(WHOLE[kind][:-1]) is None


@pytest.mark.parametrize("kind", WHOLE)
@quick
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_an_image_or_an_image_error_and_in_a_png_no_other_image(
    kind: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(WHOLE[kind])
    for share, value in changes:
        data[int(share * len(data))] = value
    found = decoded(bytes(data))
    assert found is None or (found.ndim, found.dtype) == (3, np.uint8)
    if found is not None and kind in ("PNG", "PNG in many chunks", "PNG interlaced"):
        np.testing.assert_array_equal(found, decode_image(WHOLE[kind]))


@settings(quick, max_examples=200)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=200))
def test_any_bytes_behind_any_first_bytes_give_an_image_or_an_image_error(magic: bytes, rest: bytes) -> None:
    decoded(magic + rest)


@settings(quick, max_examples=40)
@given(share=st.floats(0.05, 0.9), subsampling=st.sampled_from([0, 2]), restarts=st.sampled_from([0, 2]))
def test_a_jpeg_cut_anywhere_in_its_scan_and_ended_is_never_half_grey(
    share: float, subsampling: int, restarts: int
) -> None:
    options: dict[str, Any] = {"restart_marker_blocks": restarts} if restarts else {}
    data = noisy("JPEG", subsampling=subsampling, **options)
    start = data.index(b"\xff\xda") + 14
    assert decoded(data) is not None
    assert decoded(data[: start + int((len(data) - start) * share)] + b"\xff\xd9") is None
