"""One thread per server for what takes time, so that a server's jobs happen one after another and never in a request."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from clawdlets_ops.lab.backend import BackendError
from clawdlets_ops.lab.catalogue import Json

log = logging.getLogger(__name__)

Job = Callable[[], None]


class _Worker:
    """A daemon thread: a machine that hangs must not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job | None) -> None:
        self._jobs.put(job)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("the lab's cloud could not settle a job")


class Workers:
    """The workers by server id, started when first needed. Not thread-safe: callers hold the cloud's lock."""

    def __init__(self) -> None:
        self._by_server: dict[int, _Worker] = {}

    def submit(self, server_id: int, job: Job) -> None:
        if server_id not in self._by_server:
            self._by_server[server_id] = _Worker(f"lab-server-{server_id}")
        self._by_server[server_id].submit(job)

    def retire(self, server_id: int) -> None:
        """End the server's worker after what is queued; may be called by the worker itself."""
        if (worker := self._by_server.pop(server_id, None)) is not None:
            worker.submit(None)

    def retire_all(self) -> Callable[[float], None]:
        """As retire, for all of them; returns what waits for their ends, at most so many seconds each."""
        workers = list(self._by_server.values())
        self._by_server.clear()
        for worker in workers:
            worker.submit(None)

        def join(timeout_s: float) -> None:
            for worker in workers:
                worker.join(timeout_s)

        return join


def attempt(call: Job) -> Json | None:
    """Do it; the error of an action (code, message) when it failed."""
    try:
        call()
    except BackendError as error:
        return {"code": error.code, "message": error.message}
    except Exception as error:
        # Whatever it is: a client that polls must get an end of its action.
        log.exception("unexpected error of the machine backend")
        return {"code": "server_error", "message": f"unexpected {type(error).__name__}; see the log of the lab"}
    return None
