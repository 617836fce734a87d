"""The image formats that are read, the endings of their files, and what a file is that has none of them."""

from functools import cache
from importlib.util import find_spec

from PIL import Image

HEIF = "HEIF"
# Pillow's name of each format that is read, and the endings by which files count as images when a folder is searched.
# Pillow opens more, whatever the ending is: PostScript, for example, with another program. JPEG stands for MPO, too.
FORMATS = {
    "JPEG": (".jfif", ".jpeg", ".jpg"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
    "TGA": (".tga",),
    HEIF: (".heic", ".heif"),  # by the package pillow-heif
}
READS_HEIF = find_spec("pillow_heif") is not None
IMAGE_ENDINGS = {ending for name in FORMATS if name != HEIF or READS_HEIF for ending in FORMATS[name]}
# Images to people that are not read here, such as raw photographs. A file without an ending is often one, too.
RAW_PHOTOGRAPHS = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
UNREAD_ENDINGS = RAW_PHOTOGRAPHS | {"", ".eps", ".ico", ".jxl", ".psd", ".svg", *FORMATS[HEIF]} - IMAGE_ENDINGS

INSTALL_HEIF = "install pillow-heif (pip install pillow-heif), or convert it to JPEG"
CONVERT = "convert it to PNG or JPEG"
# The first bytes of files that often have the name of an image: what they are, and what to do.
OTHER_FILES = {
    b"version https://git-lfs": ("a Git LFS pointer", "get the image with: git lfs pull"),
    b"%!PS": ("PostScript", CONVERT),
    b"\xc5\xd0\xd3\xc6": ("PostScript", CONVERT),
    b"%PDF": ("a PDF document", CONVERT),
    b"SIMPLE  =": ("a FITS file", CONVERT),
    b"8BPS": ("a Photoshop file", CONVERT),
    b"\x00\x00\x01\x00": ("an icon (ICO)", CONVERT),
    b"\xd7\xcd\xc6\x9a": ("a WMF drawing", CONVERT),
    b"<svg": ("an SVG drawing", CONVERT),
    b"<?xml": ("an XML file", "download or export the image again"),
    b"<html": ("a web page", "download the image again"),
    b"<!doctype": ("a web page", "download the image again"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
LONGEST_START = 64  # bytes that `what_else` looks at


@cache
def readable_formats() -> list[str]:
    """Pillow's names of the formats that are read on this machine."""
    Image.init()
    if READS_HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def what_else(start: bytes) -> str:
    """What a file is that none of the formats fits, and what to do about it, in a few words.

    Args:
        start: its first bytes.
    """
    if not start:
        return "not an image: the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS and not READS_HEIF:
        return f"a HEIC image, which is not read here: {INSTALL_HEIF}"
    for first, (kind, cure) in OTHER_FILES.items():
        if start.lstrip().lower().startswith(first.lower()):
            return f"not an image but {kind}: {cure}"
    return "not an image, or damaged, or of an unknown format"
