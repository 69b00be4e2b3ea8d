"""Any image file becomes upright RGB or a named reason, and pixels depend on image and seed alone."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lib.data import BadImage, ImagePipeline, decode_image
from lib.data.images import MAX_PIXELS
from lib.errors import InputError


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that lossy files stay near the original."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one).astype(float) - np.asarray(other).astype(float)).mean())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_usual_formats_come_out_as_they_went_in(format):
    assert difference(decode_image(encode(picture(), format)), picture()) < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    # What turns each orientation upright, undone: the stored pixels of a camera held that way.
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = picture() if undo is None else picture().transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(decode_image(encode(stored, "PNG", exif=exif)), picture()) == 0
    if undo is not None:
        untold = decode_image(encode(stored, "PNG"))
        assert untold.size != picture().size or difference(untold, picture()) > 1


def test_transparency_is_laid_over_white():
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert np.asarray(decode_image(encode(image, "PNG"))).min() == 255
    palette = picture().quantize(16)
    palette.info["transparency"] = bytes([0] * 16)
    assert np.asarray(decode_image(encode(palette, "PNG", transparency=bytes(16)))).min() == 255


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), "PNG")))
    assert np.abs(decoded[..., 0] - values / 257).max() <= 0.5


def test_gray_palette_and_cmyk_become_rgb():
    for mode in ("1", "L", "LA", "P", "CMYK"):
        image = picture().convert(mode)
        decoded = decode_image(encode(image, "TIFF" if mode == "CMYK" else "PNG"))
        assert decoded.mode == "RGB" and difference(decoded, image.convert("RGB")) < 1


def test_the_first_frame_of_an_animation_is_taken():
    frames = [picture(seed=seed) for seed in range(3)]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = decode_image(animation)
    assert difference(decoded, frames[0]) < 8 < difference(decoded, frames[1])


def bomb(side: int) -> bytes:
    """A PNG that says it is side x side pixels and has no pixels."""

    def block(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = block(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(b"")) + block(b"IEND", b"")


def test_every_way_of_being_bad_has_its_reason(tmp_path):
    whole = encode(picture(), "JPEG")
    reasons = {
        b"": "empty",
        b"this is text": "not_an_image",
        whole[: len(whole) // 2]: "truncated",
        whole[:20]: "truncated",
        encode(picture(), "PNG")[:-40]: "truncated",
        bomb(int(MAX_PIXELS**0.5) + 1): "oversized",
        bomb(60_000): "oversized",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "not_an_image",
    }
    for content, reason in reasons.items():
        with pytest.raises(BadImage) as bad:
            decode_image(content)
        assert bad.value.reason == reason, (content[:30], bad.value.reason)
        (tmp_path / "image.jpg").write_bytes(content)
        with pytest.raises(BadImage, match=reason):
            decode_image(tmp_path / "image.jpg")
    for path, reason in ((tmp_path / "none.jpg", "missing"), (tmp_path, "unreadable")):
        with pytest.raises(BadImage, match=reason):
            decode_image(path)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_no_cut_of_a_file_raises_anything_else():
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        content = encode(picture(), format)
        for length in range(0, len(content), 1 + len(content) // 60):
            try:
                assert decode_image(content[:length]).mode == "RGB"
            except BadImage as bad:
                assert bad.reason in ("empty", "truncated", "not_an_image", "unreadable")


def test_the_files_made_to_break_readers(shared):
    reasons = {
        "bomb_196_megapixels.png": "oversized",
        "header_only.jpg": "truncated",
        "text_renamed.jpg": "not_an_image",
        "truncated.jpg": "truncated",
        "zero_bytes.jpg": "empty",
    }
    for path in sorted((shared / "data" / "broken").iterdir()):
        try:
            image = decode_image(path)
            assert path.name not in reasons and image.mode == "RGB", path.name
            assert ImagePipeline(64, augment="strong")(image, 1).shape == (3, 64, 64)
        except BadImage as bad:
            assert bad.reason == reasons[path.name]
    turned = shared / "data" / "broken" / "exif_rotated.jpg"
    stored = Image.open(turned).convert("RGB")
    assert difference(decode_image(turned), ImageOps.exif_transpose(Image.open(turned))) == 0
    assert difference(decode_image(turned), stored) > 10


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 33), (97, 20), (20, 97), (224, 168)])
def test_crop_is_resize_and_then_crop(size):
    image = picture(*size)
    shorter, longer = sorted(size)
    resized_longer = int(24 * longer / shorter)
    offset = (resized_longer - 24) // 2
    wide = size[0] >= size[1]
    whole = image.resize((resized_longer, 24) if wide else (24, resized_longer), Image.Resampling.BICUBIC)
    naive = whole.crop((offset, 0, offset + 24, 24) if wide else (0, offset, 24, offset + 24))
    pixels = ImagePipeline(24)(image, 0).permute(1, 2, 0).numpy()
    assert difference(Image.fromarray(pixels), naive) < 0.5
    if shorter != longer:
        squashed = ImagePipeline(24, "squash")(image, 0).permute(1, 2, 0).numpy()
        assert difference(Image.fromarray(squashed), naive) > 1


def test_pad_keeps_the_aspect_between_black_bars():
    pixels = ImagePipeline(32, "pad")(Image.new("RGB", (64, 16), "white"), 0)
    assert pixels[:, 12:20].min() == 255 and pixels[:, :12].max() == 0 and pixels[:, 20:].max() == 0


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("augment", ["none", "light", "jitter", "strong"])
def test_any_shape_gives_the_size_asked_for(resize, augment):
    for size in ((1, 1), (1, 5000), (5000, 1), (3, 500), (32, 32)):
        pixels = ImagePipeline(32, resize, augment)(Image.new("RGB", size, "red"), 3)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("augment", ["light", "jitter", "strong"])
def test_augmentation_is_a_function_of_its_seed(augment):
    pipeline = ImagePipeline(32, augment=augment)
    torch.manual_seed(1)
    first = pipeline(picture(), 7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(pipeline(picture(), 7), first)
    assert torch.equal(torch.get_rng_state(), before)  # dropout is replayed from this state
    assert not all(torch.equal(pipeline(picture(), seed), first) for seed in range(8, 12))
    plain = ImagePipeline(32)
    assert torch.equal(plain(picture(), 7), plain(picture(), 8))


def test_wrong_settings_are_named():
    for settings in ({"size": 0}, {"size": 8, "augment": "wild"}, {"size": 8, "resize": "stretch"}):
        with pytest.raises(InputError, match=str(list(settings.values())[-1])):
            ImagePipeline(**settings)
