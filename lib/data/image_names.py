"""Names of image files: the formats that are read, their extensions, and hidden files."""

READABLE = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
}
"""Pillow's formats that are read, each with its file extensions, the usual one first."""

UNREADABLE = (".heic", ".heif", ".hif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")
"""Extensions of images that Pillow cannot read: such files are counted and skipped, not overlooked."""

IMAGE_EXTENSIONS = (*(extension for extensions in READABLE.values() for extension in extensions), *UNREADABLE)
"""Every extension of an image, for folders, tables and tars alike; compare in lower case."""


def is_image_name(name: str) -> bool:
    """Whether the name is that of an image file, readable or not, and not hidden."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether the file's own name begins with a dot, as .DS_Store and ._photo.jpg of macOS: never part of the data."""
    return name.rpartition("/")[2].startswith(".")
