"""Looks at TCP ports from where it runs. Self-contained: handed to ``python3 -`` on its standard input, from any vantage.

    python3 - FAMILY ADDRESS PORT [FAMILY ADDRESS PORT …]

Prints ``{"results": [{"family", "address", "port", "outcome", "banner", "detail"}]}``. Each target gets up to three fresh
connects of at most two seconds; one that opens decides. ``refused`` means that something answered no, ``filtered`` that
nothing answered, ``unreachable`` that there was no way. Of an open port the first 60 bytes that it says by itself are kept.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import threading

CONNECTS = 3
CONNECT_TIMEOUT_S = 2.0
BANNER_TIMEOUT_S = 1.0
APART_S = 0.25
BANNER_BYTES = 60
OUTCOMES = ("open", "refused", "filtered", "unreachable", "error")
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETDOWN)


class Look:
    """One target: up to three connects, a little apart, until one opens."""

    def __init__(self, family: int, address: str, port: int) -> None:
        self.family, self.address, self.port = family, address, port
        self.opened = threading.Event()
        self.seen: list[tuple[str, str, str]] = []

    def run(self) -> None:
        """All connects; returns when every one has ended."""
        attempts = [threading.Thread(target=self.attempt, args=(number,)) for number in range(CONNECTS)]
        for attempt in attempts:
            attempt.start()
        for attempt in attempts:
            attempt.join()

    def attempt(self, number: int) -> None:
        """One connect, unless an earlier one has opened."""
        if self.opened.wait(number * APART_S):
            return
        try:
            self.seen.append(self.connect())
        except OSError as error:
            self.seen.append((outcome_of(error), "", str(error)))

    def connect(self) -> tuple[str, str, str]:
        """One fresh connect: outcome, banner, detail. OSError when it does not open."""
        kind = socket.AF_INET6 if self.family == 6 else socket.AF_INET
        place = socket.getaddrinfo(self.address, self.port, kind, socket.SOCK_STREAM)[0][4]
        with socket.socket(kind, socket.SOCK_STREAM) as stream:
            stream.settimeout(CONNECT_TIMEOUT_S)
            stream.connect(place)
            self.opened.set()
            return "open", banner(stream), ""

    def result(self) -> dict[str, object]:
        """The most telling outcome."""
        outcome, said, detail = min(self.seen, key=lambda one: OUTCOMES.index(one[0]))
        return {
            "family": self.family,
            "address": self.address,
            "port": self.port,
            "outcome": outcome,
            "banner": said,
            "detail": detail,
        }


def outcome_of(error: OSError) -> str:
    """What a failed connect means."""
    if isinstance(error, (TimeoutError, socket.timeout)) or error.errno == errno.ETIMEDOUT:
        return "filtered"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    return "unreachable" if error.errno in UNREACHABLE else "error"


def banner(stream: socket.socket) -> str:
    """What the other side says by itself, its printable part; silence is an answer too."""
    stream.settimeout(BANNER_TIMEOUT_S)
    try:
        said = stream.recv(BANNER_BYTES)
    except OSError:
        return ""
    return "".join(chr(byte) if 32 <= byte < 127 else " " for byte in said).strip()


def main(words: list[str]) -> None:
    """All targets at once."""
    looks = [Look(int(words[at]), words[at + 1], int(words[at + 2])) for at in range(0, len(words), 3)]
    threads = [threading.Thread(target=look.run) for look in looks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"results": [look.result() for look in looks]}, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
