"""An image of every kind that people have on their disks, with the pixels that it was made of where
nothing is lost.
"""

import functools
import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_image

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
WIDTH, HEIGHT = 48, 32
PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((WIDTH, HEIGHT))
RGB = np.asarray(PHOTO)

Kind = tuple[bytes, np.ndarray | None]


def saved(image, kind, *, orientation=0, **options):
  """The bytes of a PIL image as a file, with an EXIF orientation."""
  file = io.BytesIO()
  if orientation:
    options["exif"] = Image.Exif()
    options["exif"][0x0112] = orientation
  image.save(file, kind, **options)
  return file.getvalue()


def chunk(kind, body):
  """A chunk of a PNG."""
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth, colour, rows, extra=b"", interlaced=False):
  """A PNG by hand; `rows` are bytes `[rows, n]`, or a list of such parts."""
  parts = rows if interlaced else [rows]
  data = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
  header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlaced)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + extra
    + chunk(b"IDAT", zlib.compress(data))
    + chunk(b"IEND", b"")
  )


def with_wrong_checksum(content, kind):
  """A PNG in which the checksum of its first chunk of a kind is wrong."""
  at = content.index(kind)
  end = at + 4 + int.from_bytes(content[at - 4 : at], "big")
  return content[:end] + bytes(byte ^ 255 for byte in content[end : end + 4]) + content[end + 4 :]


def without_marker(content):
  """A JPEG without Adobe's marker."""
  at = content.index(b"\xff\xee")
  return content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]


def gray(values):
  """Gray values `[H, W]` as RGB."""
  return np.repeat(np.uint8(values)[..., None], 3, 2)


def _jpegs():
  cmyk = saved(PHOTO.convert("CMYK"), "JPEG", quality=95)
  at = cmyk.index(b"Adobe") + 11  # its colour transform: 2 is YCCK
  frames = {"save_all": True, "append_images": [PHOTO.rotate(180)]}
  return {
    "JPEG": saved(PHOTO, "JPEG", quality=95),
    "JPEG 4:4:4": saved(PHOTO, "JPEG", subsampling=0),
    "JPEG 4:2:2": saved(PHOTO, "JPEG", subsampling=1),
    "JPEG gray": saved(PHOTO.convert("L"), "JPEG"),
    "JPEG progressive": saved(PHOTO, "JPEG", progressive=True),
    "JPEG arithmetic": (GOLDEN / "arithmetic.jpg").read_bytes(),
    "JPEG RGB": saved(PHOTO, "JPEG", keep_rgb=True),
    "JPEG CMYK": cmyk,
    "JPEG CMYK without marker": without_marker(cmyk),
    "JPEG YCCK": cmyk[:at] + b"\2" + cmyk[at + 1 :],
    "JPEG and zeros": saved(PHOTO, "JPEG") + bytes(100),
    "JPEG EXIF": saved(PHOTO, "JPEG", orientation=6),
    "JPEG ICC": saved(PHOTO, "JPEG", icc_profile=_profile()),
    "MPO": saved(PHOTO, "MPO", **frames),
    "MPO, second frame cut": saved(PHOTO, "MPO", **frames)[:-100],
  }


def _profile():
  return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _pngs_by_depth():
  rng, found = np.random.default_rng(0), {}
  for depth in (1, 2, 4, 8):
    values = rng.integers(0, 2**depth, (HEIGHT, WIDTH), np.uint8)
    packed = _packed(values, depth)
    palette = rng.integers(0, 256, (2**depth, 3), np.uint8)
    plte = chunk(b"PLTE", palette.tobytes())
    trns = chunk(b"tRNS", rng.integers(0, 256, 2**depth, np.uint8).tobytes())
    found[f"PNG gray {depth}"] = png(depth, 0, packed), gray(values * (255 // (2**depth - 1)))
    found[f"PNG palette {depth}"] = png(depth, 3, packed, plte), palette[values]
    found[f"PNG palette {depth}, transparent"] = (
      png(depth, 3, packed, plte + trns),
      palette[values],
    )
  for name, colour, channels in (
    ("gray", 0, 1),
    ("RGB", 2, 3),
    ("gray alpha", 4, 2),
    ("RGBA", 6, 4),
  ):
    for kind in (">u1", ">u2"):
      values = rng.integers(0, 256 ** int(kind[2]), (HEIGHT, WIDTH, channels)).astype(kind)
      high = np.uint8(values >> (8 * int(kind[2]) - 8))
      seen = high[..., :3] if channels > 2 else gray(high[..., 0])
      found[f"PNG {name} {8 * int(kind[2])}"] = png(8 * int(kind[2]), colour, values), seen
  found["PNG gray 16, one transparent"] = (
    png(16, 0, np.full((HEIGHT, WIDTH), 4000, ">u2"), chunk(b"tRNS", struct.pack(">H", 4000))),
    gray(np.full((HEIGHT, WIDTH), 4000 >> 8)),
  )
  return found


def _packed(values, depth):
  bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :]
  return np.packbits(bits.reshape(len(values), -1), axis=1)


def _other_pngs():
  passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
  parts = [RGB[y::down, x::right] for y, x, down, right in (*passes, (1, 0, 2, 1))]
  plain, frames = saved(PHOTO, "PNG"), {"save_all": True, "append_images": [PHOTO.rotate(180)]}
  gamma = png(8, 2, RGB, chunk(b"gAMA", struct.pack(">I", 100_000)))
  at = plain.rindex(b"IEND") - 12  # the last byte of the data's own checksum
  flipped = plain[: at + 3] + bytes([plain[at + 3] ^ 255]) + plain[at + 4 :]
  data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in RGB))
  adler = png(8, 2, RGB).replace(
    chunk(b"IDAT", data), chunk(b"IDAT", data[:-1] + bytes([data[-1] ^ 255]))
  )
  found = {
    "PNG": plain,
    "PNG interlaced": png(8, 2, parts, interlaced=True),
    "PNG gamma": gamma,
    "PNG sBIT": png(8, 2, RGB, chunk(b"sBIT", b"\5\6\5")),
    "PNG ICC": saved(PHOTO, "PNG", icc_profile=_profile()),
    "PNG ICC damaged": png(8, 2, RGB, chunk(b"iCCP", b"x\0\0" + zlib.compress(b"nonsense"))),
    "PNG ICC of 3 MB": png(8, 2, RGB, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20)))),
    "PNG EXIF": saved(PHOTO, "PNG", orientation=6),
    "APNG": saved(PHOTO, "PNG", **frames),
    "APNG with another default": saved(PHOTO, "PNG", default_image=True, **frames),
    "PNG wrong checksum of the header": with_wrong_checksum(plain, b"IHDR"),
    "PNG wrong checksum of the data": with_wrong_checksum(plain, b"IDAT"),
    "PNG wrong checksum of the rest": with_wrong_checksum(gamma, b"gAMA"),
    "PNG wrong checksum below": adler,
    "PNG without its end": plain[:-12],
    "PNG and more": plain + b"more",
    "PNG wrong checksums": flipped,
  }
  return {name: (content, RGB) for name, content in found.items()}


def _tiff_of_12_bits(values):
  """By hand: Pillow reads it, but does not write it."""
  data = np.stack([values[:, ::2] >> 4, (values[:, ::2] & 15) << 4 | values[:, 1::2] >> 8], 2)
  data = np.uint8(np.concatenate([data, (values[:, 1::2] & 255)[..., None]], 2)).tobytes()
  return _tiff(data, (1, 12))


def _tiff(data, bits, *more):
  """Rows of samples, `(samples, bits of each)`, with further tags."""
  samples = (
    ("<HHII", 258, 4, 1, bits[1]) if bits[0] == 1 else ("<HHIHH", 258, 3, 2, bits[1], bits[1])
  )
  # Width, height, no compression, black is zero, where the data is, samples, rows, bytes.
  tags = [(256, WIDTH), (257, HEIGHT), (259, 1), (262, 1), (273, 8), (277, bits[0])]
  tags += [(278, HEIGHT), (279, len(data)), *more]
  found = [("<HHII", tag, 4, 1, value) for tag, value in tags] + [samples]
  entries = b"".join(struct.pack(*entry) for entry in sorted(found, key=lambda entry: entry[1]))
  return (
    b"II*\0"
    + struct.pack("<I", 8 + len(data))
    + data
    + struct.pack("<H", len(found))
    + entries
    + bytes(4)
  )


def _tiffs():
  rng = np.random.default_rng(1)
  deep = rng.integers(0, 2**16, (HEIGHT, WIDTH), np.uint16)
  to_lab = ImageCms.buildTransform(
    ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
  )
  white_is_zero = saved(Image.fromarray(deep), "TIFF", tiffinfo={262: 0})
  half = np.full((HEIGHT, WIDTH, 2), 128, np.uint8)
  return {
    "TIFF gray, multiplied by alpha": (
      _tiff(half.tobytes(), (2, 8), (338, 1)),
      gray(np.full((HEIGHT, WIDTH), 255)),
    ),
    "TIFF": (saved(PHOTO, "TIFF"), RGB),
    "TIFF LZW": (saved(PHOTO, "TIFF", compression="tiff_lzw"), RGB),
    "TIFF deflate": (saved(PHOTO, "TIFF", compression="tiff_adobe_deflate"), RGB),
    "TIFF JPEG": (saved(PHOTO, "TIFF", compression="jpeg"), None),
    "TIFF fax": (saved(PHOTO.convert("1"), "TIFF", compression="group4"), None),
    "TIFF CMYK": (saved(PHOTO.convert("CMYK"), "TIFF"), RGB),
    "TIFF LAB": (saved(ImageCms.applyTransform(PHOTO, to_lab), "TIFF"), None),
    "TIFF 16": (saved(Image.fromarray(deep), "TIFF"), gray(deep >> 8)),
    "TIFF 12": (_tiff_of_12_bits(deep >> 4), gray(deep >> 8)),
    "TIFF 16, white is zero": (white_is_zero, gray(255 - (deep >> 8))),
    "TIFF turned": (saved(PHOTO, "TIFF", orientation=6), np.rot90(RGB, -1)),
    "TIFF of two": (saved(PHOTO, "TIFF", save_all=True, append_images=[PHOTO.rotate(180)]), RGB),
  }


def _others():
  rng = np.random.default_rng(2)
  alpha = rng.integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
  rgba, few = Image.fromarray(np.concatenate([RGB, alpha], 2)), PHOTO.quantize(64)
  colours = np.asarray(few.convert("RGB"))
  frames = {"save_all": True, "append_images": [PHOTO.rotate(180)]}
  deep = rng.integers(0, 2**16, (HEIGHT, WIDTH, 3)).astype(">u2")
  ten = rng.integers(0, 2**10, (HEIGHT, WIDTH)).astype(">u2")
  size = f"{WIDTH} {HEIGHT}"
  return {
    "WebP": (saved(PHOTO, "WEBP"), None),
    "WebP lossless": (saved(PHOTO, "WEBP", lossless=True), RGB),
    "WebP alpha": (saved(rgba, "WEBP", lossless=True, exact=True), RGB),
    "WebP of two": (saved(PHOTO, "WEBP", lossless=True, **frames), RGB),
    "WebP EXIF": (saved(PHOTO, "WEBP", orientation=6), None),
    "GIF": (saved(few, "GIF"), colours),
    "GIF of two": (saved(few, "GIF", save_all=True, append_images=[few.rotate(180)]), colours),
    "GIF transparent": (saved(few, "GIF", transparency=5), colours),
    "BMP": (saved(PHOTO, "BMP"), RGB),
    "BMP palette": (saved(few, "BMP"), colours),
    "BMP alpha": (saved(rgba, "BMP"), RGB),
    "BMP 1": (saved(PHOTO.convert("1"), "BMP"), None),
    "AVIF": (saved(PHOTO, "AVIF"), None),
    "AVIF alpha": (saved(rgba, "AVIF"), None),
    "AVIF EXIF": (saved(PHOTO, "AVIF", orientation=6), None),
    "JPEG 2000": (saved(PHOTO, "JPEG2000"), RGB),
    "JPEG 2000 stream": (saved(PHOTO, "JPEG2000", no_jp2=True), RGB),
    "JPEG 2000 16": (
      saved(Image.fromarray(np.ascontiguousarray(deep[..., 0], np.uint16)), "JPEG2000"),
      gray(deep[..., 0] >> 8),
    ),
    "PPM": (saved(PHOTO, "PPM"), RGB),
    "PPM as text": (b"P3 2 1 255\n0 1 2 30 40 50\n#\n", np.uint8([[[0, 1, 2], [30, 40, 50]]])),
    "PGM": (saved(PHOTO.convert("L"), "PPM"), gray(PHOTO.convert("L"))),
    "PGM 16": (f"P5 {size} 65535\n".encode() + deep[..., 0].tobytes(), gray(deep[..., 0] >> 8)),
    "PGM 10": (f"P5 {size} 1023\n".encode() + ten.tobytes(), gray(ten * 65535.0 / 1023 // 256)),
    "PBM": (saved(PHOTO.convert("1"), "PPM"), None),
  }


@functools.cache
def kinds() -> dict[str, Kind]:
  """Content by name, and the pixels that it was made of; None where some are lost."""
  jpegs = {name: (content, None) for name, content in _jpegs().items()}
  return {**jpegs, **_pngs_by_depth(), **_other_pngs(), **_tiffs(), **_others()}


# Not read, with the phrase that says why.
UNREADABLE = {
  "empty": (b"", "it is empty"),
  "zeros": (bytes(5000), "it holds nothing but zeros"),
  "pointer": (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 12345\n",
    "it is a Git LFS pointer",
  ),
  "page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "it is a web page"),
  "page, commented": (b"<!-- 403 -->\n<HTML></HTML>", "it is a web page"),
  "page of XML": (
    b'\xef\xbb\xbf<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">',
    "it is a web page",
  ),
  "raw": (b"\0\0\0\x18ftypcrx " + bytes(50), "it is a camera's raw file"),
  "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is XML"),
  "JSON": (b'{"message": "Not Found"}', "it is JSON"),
  "text": ("Datei nicht gefunden: ä".encode(), "it is text"),
  "HEIC": (b"\0\0\0\x18ftypheic" + bytes(50), "it is HEIC, .*convert it"),
  "JPEG XL": (b"\xff\x0a\xfa\x1f" + bytes(50), "it is JPEG XL"),
  "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "it is SVG"),
  "PDF": (b"%PDF-1.4\n" + bytes(50), "it is PDF"),
  "film": (b"\0\0\0\x18ftypmp42" + bytes(50), "it is a film"),
  "archive": (b"PK\3\4" + bytes(50), "it is an archive"),
  "noise": (bytes(range(128, 256)) * 3, "it is of no kind of image"),
  "floats": (saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32 bits"),
  "integers": (saved(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "32 bits"),
  "header alone": (b"\xff\xd8\xff", "it is cut off"),
  "damaged": (b"\xff\xd8\xff" + bytes(100) + b"\xff\xd9", "its JPEG data is damaged"),
}
