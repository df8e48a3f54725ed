"""The lab's background process: the emulated cloud, its machines' watchers, the tailnet, the controls and the faults.

``python -m clawdlets_ops.lab.daemon --lab-dir DIR`` returns when the lab answers (0) or could not come up (1, the reason on
standard error); the process it leaves behind ends on SIGTERM. It takes nothing down: that is ``control.down``, which also
works when this process is gone.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import read_private
from clawdlets_ops.lab.backend import BackendError
from clawdlets_ops.lab.cloud import Cloud
from clawdlets_ops.lab.control import FIREWALL_ROUTE
from clawdlets_ops.lab.distance import FaultyNetwork
from clawdlets_ops.lab.faults import ROUTE as FAULTS_ROUTE
from clawdlets_ops.lab.faults import FaultyEmulator, parse_fault
from clawdlets_ops.lab.grammar import ApiError
from clawdlets_ops.lab.headscale import REAL
from clawdlets_ops.lab.mishaps import FaultyMachines, Mishaps
from clawdlets_ops.lab.processes import ProcessId
from clawdlets_ops.lab.registry import LabRecord, read_record
from clawdlets_ops.lab.tailnet import Listeners, bring_up
from clawdlets_ops.layout import Layout
from clawdlets_ops.process import LocalRunner

log = logging.getLogger(__name__)

READY = b"ready"
CLOUD_READY_S = 30.0


class Lab:
    """All parts of a running lab, made from its record; LabError, CommandError when one cannot be."""

    def __init__(self, record: LabRecord) -> None:
        folder = record.lab_dir
        runner = LocalRunner({"PATH": record.path, "LANG": "C.UTF-8"})
        token = read_private(folder / "token").strip()
        with ExitStack() as undo:
            self.network = FaultyNetwork(record.net, runner)
            self.network.up(nodes=record.tailnet == REAL)
            mishaps = Mishaps(self.network)
            self.book = mishaps.book
            self.tailnet = bring_up(record, self.network, runner)
            undo.callback(self.tailnet.close)
            self.machines = mishaps.machines = FaultyMachines(
                folder / "machines",
                base=Layout(record.root).cache / "lab" / "base",
                network=self.network,
                book=self.book,
                runner=runner,
                path=record.path,
                on_down=self.tailnet.left,
                on_off=self._powered_off,
            )
            self._listeners = Listeners(self.network, self.tailnet)
            undo.callback(self._listeners.close)
            undo.callback(self.machines.close)
            self._cloud_ready = threading.Event()
            self.machines.resume()
            self.cloud = Cloud(
                backend=self.machines, addresses=record.net, state_file=folder / "cloud.json", clock=self.book.now
            )
            self._emulator = FaultyEmulator(
                self.cloud,
                book=self.book,
                token=token,
                journal_file=folder / "journal.jsonl",
                port=urlsplit(record.endpoint).port or 0,
                extra_routes={
                    ("GET", "/lab/tailnet"): self._tailnet,
                    ("GET", "/lab/tailnet/account"): lambda _: self.tailnet.account(),
                    ("GET", "/lab/machines"): self._machines,
                    ("GET", FIREWALL_ROUTE): self._firewall,
                    ("POST", FIREWALL_ROUTE): self._set_firewall,
                    ("GET", FAULTS_ROUTE): self._faults,
                    ("POST", FAULTS_ROUTE): self._inject,
                    ("DELETE", FAULTS_ROUTE): self._clear,
                },
            )
            self._cloud_ready.set()
            self._serve()
            undo.pop_all()

    @property
    def endpoint(self) -> str:
        return self._emulator.endpoint

    def close(self) -> None:
        """Stop answering; machines run on."""
        self._emulator.stop()
        self.network.close_faults()
        self._listeners.close()
        self.machines.close()
        self.tailnet.close()

    def _powered_off(self, server_id: int) -> None:
        """A guest powered itself off: the cloud says so too, as soon as there is one."""
        if self._cloud_ready.wait(timeout=CLOUD_READY_S):
            self.cloud.mark_off(server_id)

    def _serve(self) -> None:
        try:
            self._emulator.start()
        except OSError as error:
            raise LabError(
                f"the emulated cloud cannot listen: {error.strerror}",
                where="loopback",
                fix="another program took the lab's port: clawdlets lab down, then up",
            ) from error

    def _tailnet(self, _query: Mapping[str, str]) -> object:
        return self.tailnet.status(frozenset(state.server_id for state in self.machines.states()))

    def _machines(self, _query: Mapping[str, str]) -> object:
        states = self.machines.states()
        try:
            joined = self.tailnet.addresses({state.server_id: state.name for state in states if state.running})
        except ClawdletsError:  # its account tells
            log.exception("the tailnet")
            joined = {}
        return {
            "machines": [
                {
                    "id": state.server_id,
                    "name": state.name,
                    "running": state.running,
                    "installed": state.installed,
                    "leaderPid": state.leader_pid,
                    "inRescue": state.in_rescue,
                    "tailnetAddresses": list(joined.get(state.server_id, ())),
                }
                for state in states
            ]
        }

    def _firewall(self, _query: Mapping[str, object]) -> object:
        return {"cutEstablished": self.machines.cuts_established}

    def _set_firewall(self, body: Mapping[str, object]) -> object:
        cut = body.get("cutEstablished")
        if not isinstance(cut, bool):
            raise ApiError(422, "invalid_input", "cutEstablished: must be a boolean")
        with _refused():
            self.machines.cut_established(cut)
        return self._firewall({})

    def _faults(self, _query: Mapping[str, object]) -> object:
        return {"faults": [fault.to_json() for fault in self.book.all()]}

    def _inject(self, body: Mapping[str, object]) -> object:
        words = body.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ApiError(422, "invalid_input", "words: must be a list of words")
        with _refused():
            return self.book.add(parse_fault(words)).to_json()

    def _clear(self, body: Mapping[str, object]) -> object:
        ident = body.get("id")
        with _refused():
            return {"cleared": self.book.clear(None if ident is None else str(ident))}


@contextmanager
def _refused() -> Iterator[None]:
    """What the lab cannot do becomes the answer."""
    try:
        yield
    except (ClawdletsError, BackendError, OSError) as error:
        raise ApiError(422, "invalid_input", str(error)) from error


def run(lab_dir: Path, report: Callable[[bytes], None]) -> int:
    """Be the lab until SIGTERM. ``report`` gets READY, or the reason why not, once."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        record = read_record(lab_dir)
        if record is None:
            raise LabError("there is no lab on record", where=str(lab_dir), fix="clawdlets lab up")
        record = replace(record, daemon=ProcessId.of(os.getpid()))
        record.write()  # before anything is made that has to be taken down
        lab = Lab(record)
        replace(record, endpoint=lab.endpoint).write()
    except (ClawdletsError, BackendError, OSError) as error:
        log.exception("the lab could not come up")
        report(str(error).encode())
        return 1
    report(READY)
    log.info("lab %d answers at %s", record.number, lab.endpoint)
    stop.wait()
    lab.close()
    log.info("lab %d stops answering", record.number)
    return 0


def main(argv: Sequence[str]) -> int:
    """Leave a process behind that is the lab, and tell when it answers."""
    parser = argparse.ArgumentParser(prog="clawdlets_ops.lab.daemon")
    parser.add_argument("--lab-dir", type=Path, required=True)
    lab_dir = parser.parse_args(argv).lab_dir.resolve()
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as answers:
            answer = answers.read()
        if answer == READY:
            return 0
        sys.stderr.write(answer.decode() or f"the lab's process ended; see {lab_dir / 'daemon.log'}\n")
        return 1
    os.close(reader)
    _detach(lab_dir / "daemon.log")
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s"
    )

    def report(answer: bytes) -> None:
        os.write(writer, answer)
        os.close(writer)

    return run(lab_dir, report)


def _detach(log_file: Path) -> None:
    """A session of its own, with nothing open but the log (0600)."""
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    log_fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, source in ((0, null), (1, log_fd), (2, log_fd)):
        os.dup2(source, fd)
    os.close(log_fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
