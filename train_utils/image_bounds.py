"""Small files that would take a decoder much memory or time, known before Pillow sees them.

What is left is what `image_io.MAX_PIXELS` implies. Metadata are not damage: of a PNG, text and
profiles beyond a bound are hidden from Pillow, and the picture is read without them.
"""

import io
import os
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, BinaryIO

from PIL import PngImagePlugin

from train_utils.errors import UserError

MAX_PIXELS = 100_000_000
MAX_PAGES = 10_000  # of a TIFF; frames of an animation
_MAX_BYTES = 2**30  # of formats that are read whole; 100 million pixels of RGBA of 16 bits are less
_MAX_READS = 500_000  # a second or two; a PNG in chunks of 8 KiB takes as many at 500 MB
_MAX_SEGMENTS = 10_000  # before the first scan of a JPEG; a profile has 255 at most
_MAX_EXIF_SEGMENTS = 100  # Pillow copies all before for each; cameras write one
_MAX_SCANNED = 20 * MAX_PIXELS  # pixels of a JPEG times its scans; encoders write 10 or so
_MAX_TAGS = 4096  # of a page of a TIFF
_MAX_STRIPS = 2**18  # of a page; each costs 300 bytes and some microseconds
_MAX_TEXT, _MAX_TEXTS = 2**24, 3 * 2**24  # bytes of a PNG's text or profile unpacked, and of all

# Pillow holds each character twice in 4 bytes. What is more never reaches it, see `_png_hidden`.
PngImagePlugin.MAX_TEXT_CHUNK = _MAX_TEXT
PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXTS

_MAKE_SMALLER = "Scale it down or cut it into tiles."
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")  # length and kind
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_TIFF_ORDERS = {b"II": "<", b"MM": ">"}
_MARKER = re.compile(rb"\xff+([^\x00\xff])")  # anything else between segments is passed over
_FIRST_PIECE, _PIECE = 4096 - 16, 2**16  # the first has been read with the start
_EXIF, _SCAN, _END = 0xE1, 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = frozenset([0xC2, 0xC6, 0xCA, 0xCE])
_WITHOUT_LENGTH = frozenset([0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)])  # to Pillow
_STRIP_OFFSETS, _TILE_OFFSETS = 273, 324


class TooManyPieces(Exception):
    """A file is made of so many parts that reading it one by one would take minutes."""


class _InPieces(io.BufferedReader):
    """A file that refuses to be read in too many pieces, each of which costs parsers much time."""

    left = _MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise TooManyPieces(f"made of more than {_MAX_READS:,} small pieces")
        return super().read(size)


class _Without(io.RawIOBase):
    """A file as if some parts of it, (start, end) in ascending order, were not there."""

    def __init__(self, raw: Any, hidden: list[tuple[int, int]], size: int) -> None:
        starts, ends = [0, *(end for _, end in hidden)], [*(start for start, _ in hidden), size]
        self._raw, self._starts, self._place = raw, starts, 0
        self._begins = [0]  # of each part that is left, counted without the hidden ones
        for start, end in zip(starts, ends, strict=True):
            self._begins.append(self._begins[-1] + end - start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._begins[-1]}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        if self._place >= self._begins[-1]:
            return 0
        part = bisect_right(self._begins, self._place) - 1
        self._raw.seek(self._starts[part] + self._place - self._begins[part])
        size = min(len(buffer), self._begins[part + 1] - self._place)
        got = self._raw.readinto(memoryview(buffer)[:size]) or 0
        self._place += got
        return got


def bounded(path: Any, file: io.BufferedReader, size: int, whole: bool) -> BinaryIO:
    """A file to be read from its start, if Pillow will not take too much memory or time over it.

    whole: look at all of it, and verify the checksums of a PNG. Raises UserError for what would
    cost too much; for a damaged PNG what Pillow raises.
    """
    start, problem = file.read(16), ""
    is_jpeg, is_tiff = start.startswith(b"\xff\xd8"), start[:2] in _TIFF_ORDERS
    if size > _MAX_BYTES and not is_tiff:
        problem = f"larger than {_MAX_BYTES:,} bytes. {_MAKE_SMALLER}"
    elif is_jpeg:
        problem = _jpeg_problem(start, file, whole)
    elif is_tiff:
        problem = _tiff_problem(start, file)
    if problem:
        raise UserError(f"{path}: {problem}")
    file.seek(0)
    if is_jpeg or is_tiff:
        return file
    raw: Any = file.raw
    if start.startswith(_PNG_SIGNATURE):
        raw.seek(0)
        pieces = _InPieces(raw)
        if hidden := _png_hidden(pieces, whole):
            raw = _Without(raw, hidden, size)
        pieces.detach()  # or its end would close the file
    raw.seek(0)
    return _InPieces(raw)


# --- PNG -----------------------------------------------------------------------------------------


def _png_hidden(file: BinaryIO, whole: bool) -> list[tuple[int, int]]:
    """Where a PNG holds text and profiles that unpacked are more than Pillow may hold.

    whole: look behind the first pixels, too, and raise what Pillow raises for a damaged file, whose
    pixels it would else load without a look at their checksums.
    """
    hidden: list[tuple[int, int]] = []
    left, place = _MAX_TEXTS, len(_PNG_SIGNATURE)
    while True:
        file.seek(place)
        head = file.read(_CHUNK.size)
        length, kind = _CHUNK.unpack(head) if len(head) == _CHUNK.size else (0, b"IEND")
        if whole and (len(head) < _CHUNK.size or not re.fullmatch(rb"\w{4}", kind)):
            raise OSError("truncated PNG file" if len(head) < _CHUNK.size else f"chunk {kind!r}")
        if kind == b"IEND" or (kind == b"IDAT" and not whole):
            return hidden
        check, body = zlib.crc32(kind), b""
        for begin in range(0, length, _MAX_TEXT) if whole or kind in _TEXTS else ():
            body = file.read(min(length - begin, _MAX_TEXT))
            check = zlib.crc32(body, check)
        if whole and file.read(4) != struct.pack(">I", check):
            raise SyntaxError(f"broken PNG file (bad checksum in {kind!r})")
        if kind in _TEXTS:
            unpacked = _unpacked(kind, body, left) if length < _MAX_TEXT else _MAX_TEXT
            left -= unpacked
            if unpacked == _MAX_TEXT or left < 0:
                hidden.append((place, place + _CHUNK.size + length + 4))
        place += _CHUNK.size + length + 4


def _unpacked(kind: bytes, body: bytes, left: int) -> int:
    """The bytes that a PNG's text or profile takes when it is unpacked, _MAX_TEXT at most.

    left: where not even one more byte may be unpacked, nothing is.
    """
    _, _, packed = body.partition(b"\0")
    if kind == b"iTXt":
        compressed, packed = packed[:1] != b"\0", packed[2:].split(b"\0", 2)[-1]
    else:
        compressed = kind != b"tEXt"
    if not compressed:
        return len(body)
    if left <= 0:
        return _MAX_TEXT
    try:
        return len(zlib.decompressobj().decompress(packed[kind != b"iTXt" :], _MAX_TEXT))
    except zlib.error:  # Pillow takes it as absent
        return 0


# --- JPEG and TIFF --------------------------------------------------------------------------------


def _jpeg_problem(start: bytes, file: BinaryIO, whole: bool) -> str:
    """Too many segments or, of the `whole` of a JPEG, scans: each goes over all of the pixels."""
    exifs = scans = pixels = channels = 0
    progressive = False
    for number, (kind, body) in enumerate(_jpeg_segments(start, file)):
        if kind in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", body, 3)
            pixels, progressive = width * height, kind in _PROGRESSIVE_FRAMES
        elif kind == _EXIF and body[2:6] == b"Exif":
            exifs += 1
        elif kind == _SCAN:
            scans += 1
            if not whole or (body[2] == channels and not progressive):
                break
        elif kind == _END and scans:
            break
        if scans * pixels > _MAX_SCANNED:
            return f"more than {scans - 1} scans of {pixels:,} pixels. Save it as a plain JPEG."
        if exifs > _MAX_EXIF_SEGMENTS or (not scans and number > _MAX_SEGMENTS):
            return "thousands of parts before the pixels. Save it anew."
    return ""


def _jpeg_segments(start: bytes, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The markers of a JPEG file, and 16 bytes of what stands behind each."""
    data, place = start + file.read(_FIRST_PIECE), 2
    while True:
        found = _MARKER.search(data, place)
        if found and found.end() + 16 <= len(data):
            kind, place = found[1][0], found.end()
            yield kind, data[place : place + 16]
            if kind not in _WITHOUT_LENGTH:
                place += data[place] << 8 | data[place + 1]
            continue
        more = file.read(_PIECE)
        if not more:
            return
        kept = min(found.start() if found else max(place, len(data) - 1), len(data))
        data, place = data[kept:] + more, max(place - kept, 0)


def _tiff_problem(start: bytes, file: BinaryIO) -> str:
    """Too many pages in a TIFF, or too many tags, strips or tiles in one of them."""
    order, big = _TIFF_ORDERS[start[:2]], 43 in start[2:4]
    entry = struct.Struct(f"{order}{'HHQ8x' if big else 'HHI4x'}")
    count = struct.Struct(f"{order}{'Q' if big else 'H'}")
    offset = struct.Struct(f"{order}{'Q' if big else 'I'}")
    try:
        (place,), seen = offset.unpack_from(start, 8 if big else 4), set()
        while place and place not in seen:
            seen.add(place)
            file.seek(place)
            (entries,) = count.unpack(file.read(count.size))
            if entries > _MAX_TAGS:
                return f"{entries:,} tags. Save it anew."
            if len(seen) > MAX_PAGES:
                return f"more than {MAX_PAGES:,} pages. Split it."
            directory = file.read(entries * entry.size)
            for tag, _, values in entry.iter_unpack(directory):
                if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and values > _MAX_STRIPS:
                    return f"{values:,} strips or tiles. Save it with fewer of them."
            (place,) = offset.unpack(file.read(offset.size))
    except (OSError, ValueError, struct.error):
        pass  # Pillow will say what is wrong
    return ""
