"""What a token must satisfy beyond its shape: checksums, entropy, not being a placeholder. Pure.

Sources: GitHub's announcement of its token formats (CRC32 in the last six digits), BIP 173 (bech32), the age format
(C2SP age.md), Discord's reference (a bot token begins with the base64 of its user id).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from collections import Counter

_BASE62 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_PLACEHOLDER = re.compile(
    rb"(?i)x{6}|\*{4}|\.{4}|0{12}|example|placeholder|changeme|redacted|your[-_]|1234567890|abcdefghij"
)


def entropy(text: bytes) -> float:
    """Shannon entropy of the bytes of ``text``, in bits each: 0.0 for one repeated letter, 5.4 for 64 random ones."""
    if not text:
        return 0.0
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def is_placeholder(text: bytes) -> bool:
    """True for what documentation puts where a token belongs."""
    return _PLACEHOLDER.search(text) is not None


def mixes_cases(text: bytes) -> bool:
    """True when lower case, upper case and digits all occur: no hash in hex does that, and hardly a word."""
    return not text.islower() and not text.isupper() and any(48 <= byte <= 57 for byte in text)


def base62_crc32(text: bytes) -> bytes:
    """The six digits that end a token of GitHub's or npm's whose random part is ``text``."""
    number, digits = zlib.crc32(text), bytearray()
    while number:
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return bytes(reversed(digits)).rjust(6, b"0")


def is_bech32(text: str) -> bool:
    """True when ``text`` (one case throughout) is a human-readable part, ``1``, and data with a right checksum."""
    if text not in (text.lower(), text.upper()):
        return False
    prefix, separator, data = text.lower().rpartition("1")
    if not separator or not prefix or len(data) < 6 or set(data) - set(_BECH32):
        return False
    return data[-6:] == bech32_checksum(prefix, data[:-6])


def bech32_checksum(prefix: str, data: str) -> str:
    """The six letters that end a bech32 string of ``prefix`` and ``data``, all in lower case (BIP 173)."""
    spread = [ord(letter) >> 5 for letter in prefix] + [0] + [ord(letter) & 31 for letter in prefix]
    rest = 1
    for value in [*spread, *(_BECH32.index(letter) for letter in data), 0, 0, 0, 0, 0, 0]:
        top = rest >> 25
        rest = (rest & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            rest ^= generator if top >> bit & 1 else 0
    rest ^= 1
    return "".join(_BECH32[rest >> 5 * (5 - place) & 31] for place in range(6))


def is_snowflake(text: bytes) -> bool:
    """True when ``text`` is the unpadded base64 of a Discord id: 17 to 20 decimal digits."""
    try:
        decoded = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return False
    return 17 <= len(decoded) <= 20 and decoded.isdigit()


def decoded_runs(text: bytes, start: int, end: int, *, reach: int) -> list[bytes]:
    """What the base64 or hex around ``text[start:end]`` may decode to, in every alignment; at most ``reach`` bytes off."""
    left = re.search(rb"[A-Za-z0-9+/_-]*\Z", text[max(0, start - reach) : start])
    right = re.match(rb"[A-Za-z0-9+/_-]*", text[end : end + reach])
    run = (left.group() if left else b"") + text[start:end] + (right.group() if right else b"")
    found = []
    if re.fullmatch(rb"[0-9a-fA-F]+", run):
        found = [binascii.unhexlify(part[: len(part) & ~1]) for part in (run, run[1:])]
    run = run.translate(bytes.maketrans(b"-_", b"+/"))
    for skip in range(4):
        part = run[skip:]
        found.append(base64.b64decode(part[: len(part) & ~3]))
        tail = part[len(part) & ~3 :]
        if len(tail) > 1:
            found[-1] += base64.b64decode(tail + b"=" * (4 - len(tail)))
    return found
