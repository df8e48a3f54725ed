"""A bot that tries what it is told to, for the tests of the egress policy; copied to the machine.

``serve SOCKET`` is what the bot's unit runs: it takes a JSON list of attempts on a Unix socket and gives back what came of
each. ``once`` takes the same list on standard input: for other users, outside the unit. Only Python's own library.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import socket
import sys
from typing import Any

TIMEOUT_S = 1.0


def attempt(what: dict[str, Any]) -> str:
    try:
        return {"tcp": tcp, "udp": udp, "connect": proxy, "get": proxy, "name": name, "packet": packet, "raw": raw,
                "abstract": abstract, "unix": unix, "ping": ping}[what["do"]](**{key: value for key, value in what.items() if key != "do"})  # fmt: skip
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def tcp(address: str, port: int, timeout: float = TIMEOUT_S) -> str:
    with socket.create_connection((address, port), timeout=timeout):
        return "open"


def udp(address: str, port: int) -> str:
    with socket.socket(family(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect((address, port))
        sock.send(b"hello")
        return "open" if sock.recv(64) == b"hello" else "other"


def proxy(port: int, request: str, tail: str = "") -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=12) as sock:
        sock.sendall(f"{request} HTTP/1.1\r\n{tail}\r\n".encode())
        first = sock.recv(4096).split(b"\r\n")[0].split()
        return first[1].decode() if len(first) > 1 else "closed"


def name(ask: str) -> str:
    try:
        return ",".join(sorted({entry[4][0] for entry in socket.getaddrinfo(ask, 80)}))
    except socket.gaierror as error:
        return f"gai {error.errno}"


def packet() -> str:
    socket.socket(17, socket.SOCK_RAW, socket.htons(3)).close()
    return "open"


def raw(address: str) -> str:
    socket.socket(family(address), socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    return "open"


def ping(address: str) -> str:
    with socket.socket(family(address), socket.SOCK_DGRAM, 58 if ":" in address else 1) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect((address, 0))
        sock.send((b"\x80" if ":" in address else b"\x08") + b"\0\0\0\0\1\0\1")
        sock.recv(64)
        return "open"


def abstract(at: str) -> str:
    return unix("\0" + at)


def unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        return "open"


def together(attempts: list[dict[str, Any]]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(attempt, attempts))


def serve(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    own = socket.create_server(("127.0.0.1", 7000 + os.getuid() % 1000))  # a loopback port of this bot's own
    own.listen()
    while True:
        peer, _ = listener.accept()
        with peer, peer.makefile("rwb") as stream:
            stream.write(json.dumps(together(json.loads(stream.readline()))).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    elif sys.argv[1] == "ask":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(sys.argv[2])
            with sock.makefile("rwb") as stream:
                stream.write(sys.stdin.buffer.read() + b"\n")
                stream.flush()
                sys.stdout.buffer.write(stream.readline())
    else:
        print(json.dumps(together(json.load(sys.stdin))))  # noqa: T201
