"""What a host may want to reach, for the tests of the egress policy: a program of its own in a namespace of the lab.

``python3 egress_outside.py serve ADDRESS…`` listens on TCP 22, 25, 80, 443, 465, 587, 2525, 8443 and echoes on UDP 53 and
4000; ``… resolve ADDRESS RECORDS`` is a small name server: RECORDS is JSON, name → list of answers, and of a list of lists
each question gets the next one. Every question is printed as a line. Says "ready" when it listens.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import socketserver
import struct
import sys
import threading
from typing import Any

TCP_PORTS = (22, 25, 80, 443, 465, 587, 2525, 8443)
UDP_PORTS = (53, 4000)
A, PTR, AAAA = 1, 12, 28


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class Server6(Server):
    address_family = socket.AF_INET6


class Greet(socketserver.StreamRequestHandler):
    timeout = 5

    def handle(self) -> None:
        try:
            self.request.settimeout(0.5)
            self.request.recv(4096)
        except OSError:
            pass
        self.wfile.write(b"HTTP/1.0 200 outside\r\nContent-Length: 2\r\n\r\nok")


def serve(addresses: list[str]) -> None:
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for port in TCP_PORTS:
            kind = Server6 if ":" in address else Server
            threading.Thread(target=kind((address, port), Greet).serve_forever, daemon=True).start()
        for port in UDP_PORTS:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind((address, port))
            threading.Thread(target=echo, args=(sock,), daemon=True).start()


def echo(sock: socket.socket) -> None:
    while True:
        data, peer = sock.recvfrom(2048)
        sock.sendto(data, peer)


class Names:
    def __init__(self, records: dict[str, list[Any]]) -> None:
        self.records = records
        self.asked: dict[str, int] = {}

    def answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace"))
            at += 1 + query[at]
        name = ".".join(labels).lower()
        (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
        print(f"asked {name} {kind}", flush=True)  # noqa: T201 - the log that the test reads
        found = self.records.get(name)
        if found and isinstance(found[0], list):
            turn = self.asked.get(f"{name} {kind}", 0)
            self.asked[f"{name} {kind}"] = turn + 1
            found = found[min(turn, len(found) - 1)]
        answers = b""
        count = 0
        for value in found or []:
            if kind == PTR and not value[0].isdigit() and ":" not in value:
                data = b"".join(bytes([len(part)]) + part.encode() for part in value.split(".")) + b"\0"
            elif kind in (A, AAAA) and (":" in value) == (kind == AAAA):
                data = ipaddress.ip_address(value).packed
            else:
                continue
            count += 1
            answers += b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(data)) + data
        code = 0x8180 if found is not None else 0x8183
        return query[:2] + struct.pack("!HHHHH", code, 1, count, 0, 0) + query[12 : at + 5] + answers


def resolve(address: str, records: dict[str, list[Any]]) -> None:
    names = Names(records)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 53))

    def loop() -> None:
        while True:
            query, peer = sock.recvfrom(2048)
            try:
                sock.sendto(names.answer(query), peer)
            except (IndexError, struct.error):
                continue  # not a question

    threading.Thread(target=loop, daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        resolve(sys.argv[2], json.loads(sys.argv[3]))
    print("ready", flush=True)  # noqa: T201
    sys.stdin.read()  # until whoever started it goes
