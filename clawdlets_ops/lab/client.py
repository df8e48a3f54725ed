"""Asks a running lab, over its own API on loopback."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from clawdlets_ops.errors import ClawdletsError, LabError
from clawdlets_ops.files import read_private
from clawdlets_ops.lab.registry import LabRecord

TIMEOUT_S = 10.0
USER_AGENT = "clawdlets-lab"  # by which the journal tells the lab's own questions from those of its clients


@dataclass(frozen=True)
class LabClient:
    """The lab on this record."""

    record: LabRecord

    def get(self, path: str) -> Any:
        """The JSON answer to GET ``path`` (below the endpoint); LabError."""
        return self.send("GET", path)

    def send(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        """The JSON answer to this request; LabError, with the lab's own words when it refuses."""
        url = urlsplit(self.record.endpoint)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)
        try:
            token = read_private(self.record.lab_dir / "token").strip()
            text = None if body is None else json.dumps(body)
            headers = {"Authorization": f"Bearer {token}", "User-Agent": USER_AGENT}
            connection.request(method, url.path + path, body=text, headers=headers)
            response = connection.getresponse()
            content = response.read()
            if response.status not in (200, 201):
                said = json.loads(content)["error"]["message"] if body is not None else ""
                raise LabError(
                    said or f"{method} {path} was answered with {response.status}", where=self.record.endpoint
                )
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
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
