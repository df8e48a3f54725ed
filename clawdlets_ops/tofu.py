"""OpenTofu as a subprocess: one working directory and one state per host, plans read as JSON, exactly the saved plan applied.

JSON forms: opentofu.org/docs/internals/json-format. The token, the key of the state and a backend's credentials reach it by
environment, never by argv, file or variable, so that neither plan nor state can hold them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clawdlets_ops.errors import BusyError, CommandError
from clawdlets_ops.files import PRIVATE_FILE, ensure_dir, write_atomic
from clawdlets_ops.process import Command, Result, Runner
from clawdlets_ops.sensitive import Secret

CONFIG_FILE = "main.tf.json"
STATE_FILE = "terraform.tfstate"
PLAN_FILE = "plan.bin"
INIT_TIMEOUT_S = 300.0
PLAN_TIMEOUT_S = 300.0
APPLY_TIMEOUT_S = 1800.0
STATE_LOCK_WAIT_S = 120

# The least that OpenTofu accepts; the passphrase is 256 random bits, and no dictionary holds it.
PBKDF2_ITERATIONS = 200_000
MAX_LOG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Encryption:
    """OpenTofu's own encryption of state and plan: PBKDF2 over ``passphrase``, AES-GCM.

    ``accept_plain`` reads a state in clear too, and writes it encrypted: for the one run that moves an old state over.
    Otherwise encryption is enforced, and a state in clear is an error.
    """

    passphrase: Secret
    accept_plain: bool = False

    def as_env(self) -> Secret:
        """The value of ``TF_ENCRYPTION`` (JSON)."""
        method = "method.aes_gcm.clawdlets"
        methods: dict[str, Any] = {"aes_gcm": {"clawdlets": {"keys": "key_provider.pbkdf2.clawdlets"}}}
        state: dict[str, Any] = {"method": method, "enforced": True}
        if self.accept_plain:
            methods["unencrypted"] = {"before": {}}
            state = {"method": method, "fallback": {"method": "method.unencrypted.before"}}
        key = {
            "passphrase": self.passphrase.reveal(),
            "iterations": PBKDF2_ITERATIONS,
            "hash_function": "sha256",
        }
        document = {
            "key_provider": {"pbkdf2": {"clawdlets": key}},
            "method": methods,
            "state": state,
            "plan": {"method": method, "enforced": True},
        }
        return Secret(json.dumps(document), "tf_encryption")


def is_encrypted(state: bytes) -> bool:
    """Whether ``state`` (a state, a backup or a plan) is what OpenTofu's encryption writes; False for anything else."""
    try:
        document = json.loads(state)
    except ValueError:
        return False
    return isinstance(document, dict) and "encrypted_data" in document and not {"resources", "outputs"} & set(document)


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
    configuration file (for instance one that names a provider mirror) or None; ``credentials`` are a backend's, by the
    name of the variable that it reads. ``lock_fds`` are kept by an apply for as long as it runs."""

    def __init__(
        self,
        runner: Runner,
        directory: Path,
        *,
        token: Secret,
        encryption: Encryption | None = None,
        cli_config: str | None = None,
        credentials: Mapping[str, Secret] | None = None,
        lock_fds: tuple[int, ...] = (),
    ) -> None:
        self._runner = runner
        self._directory = directory
        self._lock_fds = lock_fds
        self._secrets = (encryption.passphrase,) if encryption else ()
        self._env: dict[str, str | Secret] = {
            "HCLOUD_TOKEN": token,
            "TF_IN_AUTOMATION": "1",
            "TF_INPUT": "0",
            "CHECKPOINT_DISABLE": "1",
            **(credentials or {}),
        }
        if encryption:
            self._env["TF_ENCRYPTION"] = encryption.as_env()
        if cli_config:
            self._env["TF_CLI_CONFIG_FILE"] = cli_config

    def prepare(self, config: Mapping[str, Any]) -> None:
        """Write the configuration and initialise; nothing is done when both stand already.

        Another backend is taken as it is, and no state is copied to it: what exists in the cloud is adopted.
        """
        ensure_dir(self._directory)
        before = self._directory / CONFIG_FILE
        old = before.read_text() if before.exists() else ""
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomic(before, text)
        initialised = (self._directory / ".terraform.lock.hcl").exists() and (self._directory / ".terraform").is_dir()
        if initialised and _requirements(old) == _requirements(text):
            return
        result = self._run("init", "-no-color", "-reconfigure", why="initialise OpenTofu", timeout_s=INIT_TIMEOUT_S)
        if not result.ok:
            # Not initialised, whatever lies there: the next run has to try again.
            (self._directory / CONFIG_FILE).unlink(missing_ok=True)
            self._explain(result)

    def encrypt_state(self) -> None:
        """Write the state anew, encrypted (``Encryption.accept_plain``). Reads the API; changes nothing there."""
        self._explain(
            self._run(
                "apply", "-no-color", "-refresh-only", "-auto-approve", f"-lock-timeout={STATE_LOCK_WAIT_S}s",
                why="encrypt the OpenTofu state", timeout_s=PLAN_TIMEOUT_S,
            )
        )  # fmt: skip

    def pull(self) -> Secret:
        """The state in clear, from wherever the backend has it; empty when there is none."""
        result = self._run("state", "pull", why="read the OpenTofu state", timeout_s=PLAN_TIMEOUT_S)
        self._explain(result)
        return Secret(result.stdout, "opentofu_state")

    def plan(self, *, destroy: bool = False, replace: tuple[str, ...] = ()) -> dict[str, Any]:
        """Refresh, plan, keep the plan as ``plan.bin`` (encrypted) and return its JSON."""
        words = ["-destroy"] if destroy else []
        words += [f"-replace={address}" for address in replace]
        self._explain(
            self._run(
                "plan", "-no-color", f"-out={PLAN_FILE}", f"-lock-timeout={STATE_LOCK_WAIT_S}s", *words,
                why="plan with OpenTofu", timeout_s=PLAN_TIMEOUT_S,
            )
        )  # fmt: skip
        shown = self._run("show", "-json", "-no-color", PLAN_FILE, why="read the plan", timeout_s=PLAN_TIMEOUT_S)
        document = shown.check().json()
        if not isinstance(document, dict):
            raise CommandError("read the plan: tofu printed JSON that is no plan", where="tofu")
        return document

    def apply(self, on_line: Callable[[str], None] | None = None, *, timeout_s: float = APPLY_TIMEOUT_S) -> None:
        """Apply ``plan.bin`` exactly. Its output goes to ``apply.log``: when we are killed, OpenTofu still finishes and
        saves its state, holding the lock that it inherited. Never retried here: what it did is not known."""
        try:
            result = self._run(
                "apply", "-no-color", f"-lock-timeout={STATE_LOCK_WAIT_S}s", PLAN_FILE,
                why="apply with OpenTofu", timeout_s=timeout_s, log_file=self._directory / "apply.log", on_line=on_line,
            )  # fmt: skip
        finally:
            self.discard_plan()
            for state in self._directory.glob(f"{STATE_FILE}*"):
                state.chmod(PRIVATE_FILE)  # OpenTofu makes it as the umask lets it
        self._explain(result, what="OpenTofu could not apply")

    def discard_plan(self) -> None:
        """Remove the saved plan, if there is one."""
        (self._directory / PLAN_FILE).unlink(missing_ok=True)

    def outputs(self) -> dict[str, Any]:
        """The outputs, name to value."""
        result = self._run("output", "-json", "-no-color", why="read the outputs", timeout_s=PLAN_TIMEOUT_S).check()
        return {name: entry["value"] for name, entry in result.json().items()}

    def untaint(self, address: str) -> None:
        """Take back the mark of a creation that did not end well; nothing for a resource that has none."""
        self._run("untaint", "-no-color", "-allow-missing", address, why="untaint a resource", timeout_s=PLAN_TIMEOUT_S)

    def forget(self, address: str) -> None:
        """Take a resource out of the state; the cloud keeps it."""
        self._explain(self._run("state", "rm", address, why="forget a resource", timeout_s=PLAN_TIMEOUT_S))

    def _explain(self, result: Result, *, what: str = "OpenTofu failed") -> None:
        """Nothing for status 0; else the error that a person can act on."""
        if result.ok:
            return
        said = _error_part(result)
        if "Error acquiring the state lock" in said and "crypt" not in said:
            raise BusyError(
                f"somebody else works on this state: {_lock_holder(said)}",
                where=str(self._directory),
                fix="wait for them to end, then run again; only if they are surely gone: tofu force-unlock with that ID",
            )
        for mark, error in _KNOWN:
            if mark in said:
                raise CommandError(f"{what}: {error[0]}\n{said}", where=str(self._directory), fix=error[1])
        raise CommandError(
            f"{what}\n{said}",
            where=str(self._directory),
            fix="mend what it says and run again: what exists already is recognised, not made twice",
            exit_code=result.exit_code,
        )

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
            secrets=self._secrets,
            keep_fds=self._lock_fds if log_file else (),
            log_file=log_file,
        )
        return self._runner.run(command, on_line=on_line)


# What the API or OpenTofu says, and what that means for an operator; the first that is found counts.
_KNOWN = (
    (
        "decryption failed",
        (
            "the state cannot be decrypted with this project's state key",
            "restore secrets/keys/opentofu_state.yaml from git; if that key is lost, move the state aside: "
            "what exists in the cloud is adopted",
        ),
    ),
    ("encountered unencrypted payload", ("the state is not encrypted", "run the provision stage, which encrypts it")),
    (
        "resource_unavailable",
        (
            "Hetzner has no machine of this type in this location now; no server was made or paid for",
            "run again later, or put another type into hetzner.serverTypeFallbacks, or choose another location",
        ),
    ),
    (
        "resource_limit_exceeded",
        ("the project's limit is reached", "ask for a higher limit in the console, or remove what is not used"),
    ),
    ("placement_error", ("the placement group has no room for the server", "use another placement group")),
    (
        "token_readonly",
        ("the token may only read", "make a token with read and write permission in the project's console"),
    ),
    ("rate_limit_exceeded", ("the project's request budget is used up", "wait some minutes and run again")),
    ("uniqueness_error", ("something of that name exists already", "run again: if it is ours, it is adopted")),
    ("Saved plan is stale", ("somebody else changed the state after this plan was made", "run again")),
)


def _requirements(config: str) -> Any:
    return json.loads(config).get("terraform") if config else None


def _lock_holder(said: str) -> str:
    """Who has the lock, as far as OpenTofu tells: its lock info, or the first line of the error."""
    told = dict(re.findall(r"^\s*(?:│ )?\s*(ID|Who|Created|Operation):\s+(\S.*)$", said, flags=re.MULTILINE))
    if "Who" in told:
        return (
            f"{told['Who']} since {told.get('Created', '?')} ({told.get('Operation', '?')}, ID {told.get('ID', '?')})"
        )
    found = re.search(r"Error message: (.+)", said)
    return f"the backend does not say who ({found[1].strip()})" if found else "the backend does not say who"


def _error_part(result: Result) -> str:
    """From the first error on: what a person needs of OpenTofu's long output, at most some screens of it."""
    told = result.stderr if "Error:" in result.stderr else result.stdout
    text = result.command.redactor().scrub(told[-MAX_LOG_BYTES:])
    found = re.search(r"^.*Error:", text, flags=re.MULTILINE)
    lines = (text[found.start() :].strip() if found else result.tail()).splitlines()
    return "\n".join(line[:1000] for line in lines[:60])
