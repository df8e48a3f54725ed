"""Asks a running lab, over its own API on loopback."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import read_private
from clawdlets_ops.lab.registry import LabRecord

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class LabClient:
    """The lab on this record."""

    record: LabRecord

    def get(self, path: str) -> Any:
        """The JSON answer to GET ``path`` (below the endpoint); LabError."""
        url = urlsplit(self.record.endpoint)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)
        try:
            token = read_private(self.record.lab_dir / "token").strip()
            connection.request("GET", url.path + path, headers={"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise LabError(f"GET {path} was answered with {response.status}", where=self.record.endpoint)
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LabError(
                f"the lab's process does not answer: {error}",
                where=self.record.endpoint or "no endpoint",
                fix="clawdlets lab up",
            ) from error
        finally:
            connection.close()

    def answers(self) -> bool:
        """Whether the lab's process is there and answers."""
        if self.record.daemon is None or not self.record.daemon.alive() or not self.record.endpoint:
            return False
        try:
            self.get("/lab/machines")
        except ClawdletsError:
            return False
        return True
