"""What takes time, one job after another for each server and never in a request; threads live while there are jobs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from clawdlets_ops.lab.backend import BackendError
from clawdlets_ops.lab.catalogue import Json

log = logging.getLogger(__name__)

Job = Callable[[], None]

# More would only wait for the same processors; each is a machine that boots, or one that hangs.
MOST_THREADS: Final = 64


class Workers:
    """The jobs by server id. Daemon threads: a machine that hangs must not keep the process alive."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[int, deque[Job]] = {}
        self._ready: deque[int] = deque()
        self._threads = 0

    def submit(self, server_id: int, job: Job) -> None:
        """Do it after what was submitted for this server before."""
        with self._changed:
            if server_id in self._queues:
                self._queues[server_id].append(job)
                return
            self._queues[server_id] = deque([job])
            self._ready.append(server_id)
            if self._threads < MOST_THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="lab-worker", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Until everything is done, for at most so many seconds; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queues, timeout=timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._ready:
                    self._threads -= 1
                    return
                server_id = self._ready.popleft()
                job = self._queues[server_id].popleft()
            try:
                job()
            except Exception:
                log.exception("the lab's cloud could not settle a job")
            with self._changed:
                if self._queues[server_id]:
                    self._ready.append(server_id)
                else:
                    del self._queues[server_id]
                    self._changed.notify_all()


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
