"""Which images DALI and Pillow are known to decode alike, to the bit and wherever they are cut."""

import re
import struct

import numpy as np

SOI, EOI, SOS, DHT, DQT, DRI, COM, ADOBE = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0xFE, 0xEE
HUFFMAN_FRAMES = range(0xC0, 0xC3)  # baseline, extended sequential, progressive
ALL_BITS = -1  # what a coefficient lacks before its first scan; later a number of bits
NEUTRAL_MARKERS = {DHT, DQT, DRI, COM, *range(0xE0, 0xF0)} - {ADOBE}
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan only stuffing, restarts and fill bytes follow FF

PNM_HEADER = re.compile(rb"P([56]) ([1-9]\d*) ([1-9]\d*) 255\n")  # as `to_pnm` writes it

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_BEFORE_DATA = set(b"gAMA cHRM sRGB sBIT iCCP bKGD pHYs tIME tEXt zTXt iTXt eXIf".split())
PNG_AFTER_DATA = {b"tIME", b"tEXt"}  # others, Pillow unpacks when it decodes, and may refuse


def is_plain(content: np.ndarray) -> bool:
    """Whether a file's bytes, (length) uint8, are a complete 8-bit JPEG, PNG or PNM, gray or RGB, without peculiarities.

    DALI may refuse other formats that Pillow reads, or decode them differently without an error. It also decodes only down
    to the lowest row that is wanted, so that it does not notice a truncated file.
    """
    view = content.data
    try:
        if header := PNM_HEADER.match(view[:32]):
            channels, width, height = (3 if header[1] == b"6" else 1), int(header[2]), int(header[3])
            return len(view) == header.end() + channels * width * height
        return _is_plain_png(view) if view[:8] == PNG_SIGNATURE else _is_plain_jpeg(view)
    except (struct.error, IndexError):  # the file ends in the middle
        return False


def to_pnm(pixels: np.ndarray) -> np.ndarray:
    """The bytes of a PPM file with (H, W, 3) uint8 pixels, or of a PGM file with (H, W), which both read to the bit."""
    header = b"P%d %d %d 255\n" % (6 if pixels.ndim == 3 else 5, pixels.shape[1], pixels.shape[0])
    return np.frombuffer(header + pixels.tobytes(), np.uint8)


def pnm_pixels(content: np.ndarray) -> np.ndarray | None:
    """The pixels that `to_pnm` was given, as a view of a file's bytes, (length) uint8; None if they are not of its making."""
    header = PNM_HEADER.match(content.data[:32])
    if not header or not is_plain(content):
        return None
    shape = (int(header[3]), int(header[2]), *((3,) if header[1] == b"6" else ()))
    return content[header.end() :].reshape(shape)


def _is_plain_jpeg(view: memoryview) -> bool:
    if view[0] != 0xFF or view[1] != SOI:
        return False
    lacking: dict[int, list[int]] = {}  # of each component's 64 coefficients: bits that later scans must give
    position = 2
    while view[position] == 0xFF:
        marker = view[position + 1]
        if marker == EOI:
            return bool(lacking) and not any(map(any, lacking.values()))
        (length,) = struct.unpack_from(">H", view, position + 2)
        if marker in HUFFMAN_FRAMES:
            bits, height, width, count = struct.unpack_from(">BHHB", view, position + 4)
            names = [view[position + 10 + 3 * i] for i in range(count)]
            if lacking or bits != 8 or not height or not width or (count != 1 and names != [1, 2, 3]):
                return False
            lacking = {name: [ALL_BITS] * 64 for name in names}
        elif marker == SOS:
            count = view[position + 4]
            names = [view[position + 5 + 2 * i] for i in range(count)]
            first, last, bits = struct.unpack_from("BBB", view, position + 5 + 2 * count)
            before, after = bits >> 4 or ALL_BITS, bits & 15
            if first > last:
                return False
            for name in names:
                if name not in lacking or lacking[name][first : last + 1] != [before] * (last + 1 - first):
                    return False
                lacking[name][first : last + 1] = [after] * (last + 1 - first)
        elif marker == ADOBE:
            if view[position + 4 : position + 9] == b"Adobe" and view[position + 15] != 1:  # not YCbCr
                return False
        elif marker not in NEUTRAL_MARKERS:
            return False
        position += 2 + length
        if marker == SOS:
            end = SCAN_END.search(view, position)
            if not end:
                return False
            position = end.start()
    return False


def _is_plain_png(view: memoryview) -> bool:
    depth, color, compression, filtering, interlace = struct.unpack_from("5B", view, 24)  # of IHDR
    if depth != 8 or color not in (0, 2) or compression or filtering or interlace:
        return False
    position, allowed = 33, PNG_BEFORE_DATA  # after the signature and IHDR
    while True:
        length, kind = struct.unpack_from(">I4s", view, position)
        if kind == b"IDAT":
            allowed = PNG_AFTER_DATA
        elif kind == b"IEND":
            return allowed is PNG_AFTER_DATA and position + 12 + length <= len(view)
        elif kind not in allowed:
            return False
        position += 12 + length
