"""Builds small ICC profiles, so that the tests need no file of anybody's."""

from __future__ import annotations

import struct

import numpy as np

SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # XYZ of R, G, B under D50
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
_WHITE = (0.9642, 1.0, 0.8249)


def rgb_profile(colorants: tuple[tuple[float, ...], ...], name: str = "a test") -> bytes:
    """Returns a profile of RGB pixels with sRGB's curve."""
    curve = b"para" + struct.pack(">IHH5i", 0, 3, 0, *_fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    tags = {f"{c}TRC": curve for c in "rgb"} | {
        f"{c}XYZ": _xyz(values) for c, values in zip("rgb", colorants, strict=True)
    }
    return _profile(b"RGB ", b"XYZ ", tags, name)


def grey_profile(gamma: float) -> bytes:
    """Returns a profile of grey pixels: light = value ** gamma."""
    return _profile(b"GRAY", b"XYZ ", {"kTRC": b"para" + struct.pack(">IHHi", 0, 0, 0, *_fixed(gamma))}, "a grey test")


def cmyk_profile(lab_of_cyan: tuple[float, float, float]) -> bytes:
    """Returns a profile of CMYK pixels, in which every ink but cyan has no colour and black has the usual one."""
    ramp = bytes(range(256))
    nodes = [(_lab8(*lab_of_cyan) if node & 8 else _lab8(100, 0, 0)) for node in range(16)]
    nodes = [_lab8(0, 0, 0) if index & 1 else node for index, node in enumerate(nodes)]
    unit = struct.pack(">9i", *_fixed(1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1" + struct.pack(">IBBBB", 0, 4, 3, 2, 0) + unit + ramp * 4 + b"".join(nodes) + ramp * 3
    return _profile(b"CMYK", b"Lab ", {"A2B0": lut}, "an ink test")


def _profile(space: bytes, connection: bytes, tags: dict[str, bytes], name: str) -> bytes:
    text = name.encode("utf-16-be")
    tags = tags | {"wtpt": _xyz(_WHITE)}
    tags["desc"] = b"mluc" + struct.pack(">III2s2sII", 0, 1, 12, b"en", b"US", len(text), 28) + text
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag.encode(), start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s12s4s4sIII8sI3i", start + len(body), b"test", 0x04200000, kind, space, connection,
                         bytes(12), b"acsp", b"APPL", 0, 0, 0, bytes(8), 1, *_fixed(*_WHITE))  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(*values: float) -> list[int]:
    return [round(value * 65536) for value in values]


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + struct.pack(">I3i", 0, *_fixed(*values))


def _lab8(lightness: float, a: float, b: float) -> bytes:
    return np.array([lightness * 2.55, a + 128, b + 128]).round().astype(np.uint8).tobytes()
