"""OpenTofu as a subprocess: one working directory and one state per host, plans read as JSON and gated before apply.

JSON forms: opentofu.org/docs/internals/json-format. The token reaches the provider by environment, never by argv, file
or variable, so that neither plan nor state can hold it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import CommandError, PlanRefused
from clawdlets_ops.files import ensure_dir, write_atomic
from clawdlets_ops.process import Command, Result, Runner
from clawdlets_ops.sensitive import Secret

CONFIG_FILE = "main.tf.json"
INIT_TIMEOUT_S = 300.0
PLAN_TIMEOUT_S = 300.0
APPLY_TIMEOUT_S = 1800.0
STATE_LOCK_WAIT = "120s"

# What a plan may never do to these without being told by name: their loss is the loss of a host or of its address.
PRECIOUS = ("hcloud_server", "hcloud_volume", "hcloud_primary_ip")


@dataclass(frozen=True)
class Change:
    """One planned change: ``address`` in the configuration, ``actions`` as the plan has them (create, update, delete)."""

    address: str
    type: str
    actions: tuple[str, ...]

    def __str__(self) -> str:
        verb = "replace" if set(self.actions) == {"create", "delete"} else "+".join(self.actions)
        return f"{verb} {self.address}"


def changes(plan: Mapping[str, Any]) -> tuple[Change, ...]:
    """The changes of a plan's JSON; reads and no-ops left out."""
    return tuple(
        Change(entry["address"], entry["type"], tuple(entry["change"]["actions"]))
        for entry in plan.get("resource_changes", ())
        if entry.get("mode") == "managed" and not set(entry["change"]["actions"]) <= {"no-op", "read"}
    )


def gate(planned: Collection[Change], *, host: str, allowed: Callable[[Change], bool]) -> None:
    """PlanRefused when a plan deletes or replaces something precious, or does what its stage is not about."""
    for change in planned:
        if change.type in PRECIOUS and "delete" in change.actions:
            raise PlanRefused(
                f"the plan would {change}: a server, its address or its disk is never deleted unless named",
                where=f"tofu plan of {host}",
                fix="look at what differs (tofu plan in the working directory); undo that change in the fleet file",
            )
    for change in planned:
        if not allowed(change):
            raise PlanRefused(
                f"the plan would {change}, which this stage is not about",
                where=f"tofu plan of {host}",
                fix="look at what differs, and change one thing at a time",
            )


def escape(value: Any) -> Any:
    """``value`` with template markers made literal: in JSON syntax every string is a template."""
    if isinstance(value, str):
        return value.replace("${", "$${").replace("%{", "%%{")
    if isinstance(value, Mapping):
        return {key: escape(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [escape(part) for part in value]
    return value


class Tofu:
    """One host's working directory. ``token`` is given to the provider by environment; ``cli_config`` is a CLI
    configuration file (for instance one that names a provider mirror) or None."""

    def __init__(
        self,
        runner: Runner,
        directory: Path,
        *,
        token: Secret,
        cli_config: str | None = None,
        lock_fds: tuple[int, ...] = (),
    ) -> None:
        self._runner = runner
        self._directory = directory
        self._lock_fds = lock_fds
        self._env: dict[str, str | Secret] = {
            "HCLOUD_TOKEN": token,
            "TF_IN_AUTOMATION": "1",
            "TF_INPUT": "0",
            "CHECKPOINT_DISABLE": "1",
        }
        if cli_config:
            self._env["TF_CLI_CONFIG_FILE"] = cli_config

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Write the configuration and initialise; nothing is done when both stand already."""
        ensure_dir(self._directory)
        before = self._directory / CONFIG_FILE
        old = before.read_text() if before.exists() else ""
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomic(before, text)
        initialised = (self._directory / ".terraform.lock.hcl").exists() and (self._directory / ".terraform").is_dir()
        if not initialised or _requirements(old) != _requirements(text):
            self._run("init", "-no-color", why="initialise OpenTofu", timeout_s=INIT_TIMEOUT_S).check()

    def owned(self) -> frozenset[str]:
        """Addresses of all resources that the state knows."""
        result = self._run("state", "list", why="read the OpenTofu state", timeout_s=PLAN_TIMEOUT_S)
        if not result.ok and "No state file was found" in result.stderr:
            return frozenset()
        return frozenset(result.check().stdout.split())

    def plan(self) -> tuple[Change, ...]:
        """Refresh, plan, keep the plan as ``plan.bin`` and return its changes."""
        self._run(
            "plan", "-no-color", "-out=plan.bin", f"-lock-timeout={STATE_LOCK_WAIT}",
            why="plan with OpenTofu", timeout_s=PLAN_TIMEOUT_S,
        ).check()  # fmt: skip
        shown = self._run("show", "-json", "-no-color", "plan.bin", why="read the plan", timeout_s=PLAN_TIMEOUT_S)
        return changes(shown.check().json())

    def apply(self, on_line: Callable[[str], None] | None = None) -> None:
        """Apply ``plan.bin`` exactly. Its output goes to ``apply.log``: when we are killed, OpenTofu still finishes and
        saves its state, holding the lock that it inherited. Never retried here: what it did is not known."""
        result = self._run(
            "apply", "-no-color", f"-lock-timeout={STATE_LOCK_WAIT}", "plan.bin",
            why="apply with OpenTofu", timeout_s=APPLY_TIMEOUT_S, log_file=self._directory / "apply.log", on_line=on_line,
        )  # fmt: skip
        (self._directory / "plan.bin").unlink(missing_ok=True)
        if not result.ok:
            raise CommandError(
                f"OpenTofu could not apply\n{_error_part(result)}",
                where=str(self._directory),
                fix="mend what it says and run again: what exists already is recognised, not made twice",
                exit_code=result.exit_code,
            )

    def outputs(self) -> dict[str, Any]:
        """The outputs, name to value."""
        result = self._run("output", "-json", "-no-color", why="read the outputs", timeout_s=PLAN_TIMEOUT_S).check()
        return {name: entry["value"] for name, entry in result.json().items()}

    def _run(
        self,
        *words: str,
        why: str,
        timeout_s: float,
        log_file: Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Result:
        command = Command(
            ["tofu", *words],
            why,
            env=self._env,
            cwd=self._directory,
            timeout_s=timeout_s,
            keep_fds=self._lock_fds if log_file else (),
            log_file=log_file,
        )
        return self._runner.run(command, on_line=on_line)


def _requirements(config: str) -> Any:
    return json.loads(config).get("terraform") if config else None


def _error_part(result: Result) -> str:
    """From the first error on: what a person needs of OpenTofu's long output."""
    text = result.command.redactor().scrub(result.stdout)
    found = re.search(r"^.*Error:", text, flags=re.MULTILINE)
    return text[found.start() :].strip() if found else result.tail()
