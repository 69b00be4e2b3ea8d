"""Any image file becomes upright RGB or a named reason, and pixels depend on image and seed alone."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lib.data import BadImage, ImagePipeline, decode_image
from lib.data import pipeline as pipeline_module
from lib.data.find_images import READABLE
from lib.data.images import MAX_PIXELS, Extent
from lib.data.pipeline import Resize
from lib.errors import InputError

AUGMENT = ("none", "crop", "light", "jitter", "strong")
SIDES = (slice(0, 16), slice(16, 32))


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


@pytest.mark.parametrize("format", [*READABLE])
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


def test_floats_that_are_not_finite_leave_the_others_as_they_are():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    whole = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
    for bad, shown in ((np.nan, 0), (np.inf, 255), (-np.inf, 0)):
        with_bad = values.copy()
        with_bad[3, 4] = bad
        decoded = np.asarray(decode_image(encode(Image.fromarray(with_bad), "TIFF")))
        assert (decoded[3, 4] == shown).all()
        decoded = np.where(np.arange(64).reshape(8, 8, 1) == 28, whole, decoded)
        assert np.array_equal(decoded, whole) and whole[7, 7, 0] == 255
    with pytest.raises(BadImage, match="unreadable"):
        decode_image(encode(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_a_png_with_megabytes_of_text_is_read_without_it(kind):
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("note", "x" * 2**22, zip=True) if kind == "iTXt" else texts.add_text(
        "note", "x" * 2**22, zip=kind == "zTXt"
    )
    content = encode(picture(), "PNG", pnginfo=texts)
    assert kind.encode() in content and difference(decode_image(content), picture()) == 0
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encode(picture().transpose(Image.Transpose.ROTATE_180), "PNG", pnginfo=texts, exif=exif)
    assert difference(decode_image(turned), picture()) == 0  # the other blocks are kept
    with pytest.raises(BadImage, match="truncated"):
        decode_image(content[:-40])


def test_a_png_whose_orientation_stands_in_its_metadata_is_turned():
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    assert decode_image(encode(picture(40, 30), "PNG", pnginfo=texts)).size == (30, 40)


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
    """A PNG whose header says side x side pixels, without pixels."""

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
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "unknown_format",
        b"\0\0\0\x0cJXL \r\n\x87\n": "unknown_format",
    }
    for content, reason in reasons.items():
        with pytest.raises(BadImage) as bad:
            decode_image(content)
        assert bad.value.reason == reason, (content[:30], bad.value.reason)
        (tmp_path / "image.jpg").write_bytes(content)
        with pytest.raises(BadImage, match=reason):
            decode_image(tmp_path / "image.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")  # opening it would wait for a writer
    not_files = [(tmp_path, "not_a_file"), (tmp_path / "fifo.jpg", "not_a_file"), ("/dev/zero", "not_a_file")]
    missing = [(tmp_path / "none.jpg", "missing"), (f"{tmp_path}/a\0b.jpg", "missing")]
    for path, reason in not_files + missing:
        with pytest.raises(BadImage, match=reason):
            decode_image(path)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_whatever_opening_an_image_raises_is_one_bad_image():
    def broken(extent):
        raise ZeroDivisionError

    def lost(extent):
        raise InputError("--data is gone")

    with pytest.raises(BadImage, match="unreadable"):
        ImagePipeline(8).read(broken, seed=0)
    with pytest.raises(InputError, match="--data is gone"):
        ImagePipeline(8).read(lost, seed=0)


def test_no_cut_of_a_file_raises_anything_else():
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        content = encode(picture(), format)
        for length in range(0, len(content), 1 + len(content) // 60):
            try:
                assert decode_image(content[:length]).mode == "RGB"
            except BadImage as bad:
                assert bad.reason in ("empty", "truncated", "not_an_image", "unreadable")


def reduced_sizes(content: bytes, *extents: Extent) -> list[tuple[int, int]]:
    return [decode_image(content, extent).size for extent in extents]


def test_a_jpeg_is_decoded_as_small_as_the_extent_allows():
    content = encode(picture(403, 300), "JPEG")
    shorter = [Extent(side, "shorter") for side in (300, 151, 150, 76, 75, 38, 10)]
    full, half, quarter, eighth = (403, 300), (202, 150), (101, 75), (51, 38)
    assert reduced_sizes(content, *shorter) == [full, full, half, half, quarter, eighth, eighth]
    assert reduced_sizes(content, Extent(203, "longer"), Extent(202, "longer")) == [full, half]
    assert reduced_sizes(content, Extent(102, "longer"), Extent(101, "longer")) == [half, quarter]
    assert decode_image(content).size == full
    line = encode(picture(5000, 1), "JPEG")
    for size in reduced_sizes(line, Extent(8, "longer"), Extent(8, "shorter"), Extent(1, "shorter")):
        assert max(size) >= 8 and min(size) == 1
    for format in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        assert reduced_sizes(encode(picture(), format), Extent(1, "shorter")) == [picture().size]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_reduced_jpeg_shows_what_the_full_one_shows(mode, progressive):
    content = encode(picture(400, 296).convert(mode), "JPEG", quality=95, progressive=progressive)
    full = decode_image(content)
    for scale in (2, 4, 8):
        reduced = decode_image(content, Extent(296 // scale, "shorter"))
        assert reduced.mode == "RGB" and reduced.size == (400 // scale, 296 // scale)
        assert difference(reduced, full.resize(reduced.size, Image.Resampling.BOX)) < 2
        assert difference(reduced, picture(seed=1).resize(reduced.size)) > 20


def test_a_reduced_jpeg_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(picture(400, 304).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    reduced = decode_image(content, Extent(76, "shorter"))
    assert reduced.size == (100, 76)
    assert difference(reduced, picture(400, 304).resize((100, 76), Image.Resampling.BOX)) < 3


@pytest.mark.parametrize("progressive", [False, True])
def test_reduced_decoding_finds_every_cut_that_full_decoding_finds(progressive):
    content = encode(picture(240, 160), "JPEG", progressive=progressive)

    def fate(content: bytes, extent: Extent | None) -> str:
        try:
            return str(decode_image(content, extent).mode)
        except BadImage as bad:
            return bad.reason

    fates = set()
    for length in range(0, len(content), 1 + len(content) // 80):
        full = fate(content[:length], None)
        assert all(fate(content[:length], Extent(side, "shorter")) == full for side in (80, 40, 20)), length
        fates.add(full)
    assert "truncated" in fates
    assert fate(content, Extent(20, "shorter")) == "RGB"


def test_the_size_cap_is_on_the_whole_image_however_small_it_is_wanted():
    content = bytearray(encode(picture(), "JPEG"))
    frame = content.index(b"\xff\xc0")  # the frame header: length, bits, then height and width
    content[frame + 5 : frame + 9] = struct.pack(">HH", 9000, 9000)
    with pytest.raises(BadImage, match="oversized"):
        decode_image(bytes(content), Extent(8, "shorter"))


def test_pixels_for_evaluation_hardly_depend_on_reduced_decoding(shared):
    paths = sorted((shared / "data" / "coco" / "val2017").iterdir())[:24:2]

    def large(path) -> bytes:
        image = Image.open(path).convert("RGB")
        scale = 1600 / max(image.size)
        return encode(image.resize([round(side * scale) for side in image.size]), "JPEG", quality=90)

    files = [large(path) for path in paths]
    for resize, bound in (("crop", 0.6), ("squash", 0.5), ("pad", 0.6)):
        pipeline = ImagePipeline(224, resize)

        def mean_difference(extent: Extent, pipeline=pipeline) -> float:
            pairs = [(decode_image(file), decode_image(file, extent)) for file in files]
            assert all(reduced.width < full.width for full, reduced in pairs[:3])
            pixels = [[pipeline(image, 0).float() for image in pair] for pair in pairs]
            return float(np.mean([(full - reduced).abs().mean() for full, reduced in pixels]))

        assert mean_difference(pipeline.extent) < bound
        if resize == "crop":
            assert mean_difference(Extent(112, "shorter")) > 3 * bound  # what too small a decoding does


def test_an_image_for_training_may_be_as_small_as_its_smallest_crop_allows(monkeypatch):
    monkeypatch.setattr(pipeline_module, "CROP_SCALE", (0.25, 1))
    assert ImagePipeline(224).extent == Extent(448, "shorter")
    assert ImagePipeline(224, "pad").extent == Extent(448, "longer")
    assert ImagePipeline(224, augment="jitter").extent == Extent(224, "shorter")
    assert ImagePipeline(100, augment="light").extent == Extent(200, "shorter")
    assert ImagePipeline(100, "pad", "strong").extent == Extent(100, "longer")


def test_an_image_of_a_larger_side_than_the_square_is_decoded_for_that_side(monkeypatch):
    monkeypatch.setattr(pipeline_module, "CROP_SCALE", (0.25, 1))
    assert ImagePipeline(224, Resize("crop", 256)).extent == Extent(512, "shorter")
    assert ImagePipeline(224, Resize("squash", 256), "light").extent == Extent(256, "shorter")
    assert ImagePipeline(224, Resize("crop", 256), "light").extent == Extent(448, "shorter")
    nearest = ImagePipeline(8, Resize(interpolation="nearest"))  # a reduced image has other pixels to choose from
    assert reduced_sizes(encode(picture(400, 304), "JPEG"), nearest.extent) == [(400, 304)]


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


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize(("way", "resized"), [("crop", (53, 40)), ("squash", (40, 40)), ("pad", (40, 30))])
def test_the_middle_is_cut_out_of_a_larger_side_and_bars_fill_what_is_missing(way, resized, interpolation):
    image, mode = Image.effect_noise((120, 90), 60).convert("RGB"), Image.Resampling[interpolation.upper()]
    left, top = ((side - 32) // 2 if side > 32 else -((32 - side) // 2) for side in resized)
    naive = image.resize(resized, mode).crop((left, top, left + 32, top + 32))  # Pillow fills with black
    pixels = ImagePipeline(32, Resize(way, 40, interpolation))(image, 0).permute(1, 2, 0).numpy()
    assert difference(Image.fromarray(pixels), naive) < 0.1
    for other in {"bicubic", "bilinear", "lanczos", "nearest"} - {interpolation}:
        pixels = ImagePipeline(32, Resize(way, 40, other))(image, 0).permute(1, 2, 0).numpy()
        assert difference(Image.fromarray(pixels), naive) > 0.4


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "nearest"])
def test_the_order_of_the_channels_is_turned_behind_all_else(augment, interpolation):
    rgb, bgr = (
        ImagePipeline(24, Resize("squash", 30, interpolation, channels), augment)(picture(60, 40), 5)
        for channels in ("rgb", "bgr")
    )
    assert torch.equal(rgb.flip(0), bgr) and not torch.equal(rgb, bgr)


def test_random_crops_see_what_the_middle_cuts_off(monkeypatch):
    monkeypatch.setattr(pipeline_module, "CROP_SCALE", (0.9, 1.0))
    framed = Image.new("RGB", (80, 80), "red")
    framed.paste("white", (6, 6, 74, 74))
    for way in ("crop", "squash", "pad"):
        middle = ImagePipeline(32, Resize(way, 40))(framed, 0)
        assert middle[1].min() > 200  # no red
        light = ImagePipeline(32, Resize(way, 40), "light")
        assert min(light(framed, seed)[1].min() for seed in range(5)) < 50


@pytest.mark.parametrize("size", [(300, 225), (225, 300), (333, 250), (97, 320)])
def test_crop_is_what_the_exported_image_processor_does(size):
    from transformers import CLIPImageProcessor

    square = {"height": 64, "width": 64}
    theirs = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=square, do_normalize=False, do_rescale=False)
    found = theirs(picture(*size), return_tensors="pt")["pixel_values"][0]
    assert (ImagePipeline(64)(picture(*size), 0).float() - found.float()).abs().max() <= 1


def test_pad_keeps_the_aspect_between_black_bars():
    pixels = ImagePipeline(32, "pad")(Image.new("RGB", (64, 16), "white"), 0)
    assert pixels[:, 12:20].min() == 255 and pixels[:, :12].max() == 0 and pixels[:, 20:].max() == 0


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("augment", AUGMENT)
def test_any_shape_gives_the_size_asked_for(resize, augment):
    for size in ((1, 1), (1, 5000), (5000, 1), (3, 500), (32, 32)):
        pixels = ImagePipeline(32, resize, augment)(Image.new("RGB", size, "red"), 3)
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("augment", AUGMENT[1:])
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


def test_a_very_long_image_keeps_its_middle():
    colours = np.zeros((1, 1001, 3), dtype=np.uint8)
    colours[:, 500] = 255
    for image in (Image.fromarray(colours), Image.fromarray(colours.transpose(1, 0, 2).copy())):
        brightness = ImagePipeline(32)(image, 0).float().mean(dim=0)
        assert brightness.mean() > 200 and abs(float(brightness[:, 0].mean() - brightness[:, -1].mean())) < 1


def test_pixels_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        pixels = []
        for number in (1, 3):
            torch.set_num_threads(number)
            pixels.append([ImagePipeline(48, augment=augment)(picture(300, 200), 5) for augment in AUGMENT])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*pixels, strict=True))


SIZES = {
    "CROP_SCALE": ((1.0, 1.0), (0.9, 0.9), (0.2, 0.2)),
    "COLOR_JITTER": ((0, 0, 0, 0), (0.05, 0.05, 0.05, 0.05), (0.5, 0.5, 0.5, 0.5)),
    "ROTATION": (0, 2.0, 45.0),
    "RANDAUGMENT": ((0, 9), (1, 9), (3, 25)),
}
"""Off, small and large, of each part of the strong augmentation."""


def test_each_part_of_the_augmentation_is_applied_and_as_large_as_its_size(monkeypatch):
    plain = ImagePipeline(32, "squash")(picture(), 0).float()

    def change(size: int, part: str) -> float:
        """Mean difference over seeds to the plain picture or its mirror image, with one part on."""
        for name, sizes in SIZES.items():
            monkeypatch.setattr(pipeline_module, name, sizes[size if name == part else 0])
        seen = [ImagePipeline(32, "squash", "strong")(picture(), seed).float() for seed in range(12)]
        return float(np.mean([min((s - plain).abs().mean(), (s.flip(-1) - plain).abs().mean()) for s in seen]))

    for part in SIZES:
        assert change(0, part) == 0 < change(1, part) < change(2, part), part


def test_light_flips_half_of_the_images_and_crop_none(monkeypatch):
    monkeypatch.setattr(pipeline_module, "CROP_SCALE", (1.0, 1.0))
    plain = ImagePipeline(32, "squash")(picture(), 0)
    seen = {
        augment: [ImagePipeline(32, "squash", augment)(picture(), s) for s in range(40)] for augment in AUGMENT[1:3]
    }
    assert all(torch.equal(pixels, plain) for pixels in seen["crop"])
    mirrored = [torch.equal(pixels, plain.flip(-1)) for pixels in seen["light"]]
    assert 10 < sum(mirrored) < 30
    assert all(torch.equal(p, plain) for p, flipped in zip(seen["light"], mirrored, strict=True) if not flipped)


def test_light_leaves_colours_and_jitter_leaves_places():
    red = Image.new("RGB", (60, 40), (200, 30, 30))
    assert torch.equal(ImagePipeline(32, augment="light")(red, 3), ImagePipeline(32)(red, 3))
    half = Image.new("RGB", (32, 32))
    half.paste((120, 120, 120), (0, 0, 16, 32))
    for seed in range(5):
        jittered = ImagePipeline(32, augment="jitter")(half, seed)
        assert all(len(jittered[:, :, columns].flatten(1).unique(dim=1)[0]) == 1 for columns in SIDES)


def test_wrong_settings_are_named():
    for settings in ({"size": 0}, {"size": 8, "augment": "wild"}, {"size": 8, "resize": "stretch"}):
        with pytest.raises(InputError, match=str(list(settings.values())[-1])):
            ImagePipeline(**settings)
