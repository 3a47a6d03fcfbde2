"""Opening images: good ones as the reference reads them, bad ones refused with a message a client can act on."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from redvtp.vision.images import MAX_SIDE, open_image, validate_size


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_path_and_open_file_give_the_same_rgb_image(tmp_path: Path) -> None:
    data = _png(Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20))
    file = tmp_path / "image.png"
    file.write_bytes(data)
    from_path, from_file = open_image(file), open_image(io.BytesIO(data))
    assert from_path.mode == "RGB"
    assert from_path.size == (40, 30)
    assert from_path.tobytes() == from_file.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_pixel_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4)).save(buffer, "TIFF")
    image = open_image(buffer)
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_a_phone_photo_stands_upright() -> None:
    buffer = io.BytesIO()
    sideways = Image.new("RGB", (8, 4))
    sideways.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    sideways.save(buffer, "PNG", exif=exif)
    image = open_image(buffer)
    assert image.size == (4, 8)
    assert image.getpixel((3, 0)) == (255, 255, 255)


def test_alpha_is_dropped_not_blended() -> None:
    assert open_image(io.BytesIO(_png(Image.new("RGBA", (2, 2), (10, 20, 30, 0))))).getpixel((0, 0)) == (10, 20, 30)


def test_not_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="not in an image format"):
        open_image(io.BytesIO(b"%PDF-1.4 not an image"))


def test_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="not in an image format"):
        open_image(io.BytesIO())


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.png does not exist"):
        open_image(tmp_path / "nothing.png")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_file_is_refused(image_format: str, share: float) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, image_format)
    data = buffer.getvalue()
    with pytest.raises(ValueError, match=r"damaged or cut short|not in an image format"):
        open_image(io.BytesIO(data[: int(len(data) * share)]))


@pytest.mark.parametrize("factor", [1.5, 3.0], ids=["PIL warns", "PIL refuses"])
def test_decompression_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    data = _png(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 / factor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="pixels; scale it down"):
            open_image(io.BytesIO(data))


def test_bomb_warning_turned_into_an_error_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _png(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="more than 7,000 pixels"):
            open_image(io.BytesIO(data))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (9_000, 9_000), (MAX_SIDE, 1)])
def test_odd_but_possible_sizes_pass(size: tuple[int, int]) -> None:
    validate_size(*size)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 5), "image of 0x5 has no pixels"),
        ((5, 0), "image of 5x0 has no pixels"),
        ((MAX_SIDE + 1, 1), "image of 65536x1 is longer than"),
        ((10_000, 10_000), "image of 10000x10000 has more than"),
    ],
)
def test_impossible_sizes_are_refused(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_size(*size)
