"""This project as a user has it: a wheel, installed into an environment of its own, away from the checkout.

The requirements are lent from the environment that runs the tests (a .pth file); the package itself is the wheel's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD_TIMEOUT_S = 300

_SCRIPT = """#!{python}
import sys
from {module} import {name}
sys.exit({name}())
"""


def build(into: Path) -> Path:
    """The wheel of this checkout, built as `pip wheel` builds it, without a network."""
    argv = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(into)]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [wheel] = into.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@dataclass(frozen=True)
class Installed:
    """The environment, and a home folder of its own."""

    venv: Path
    home: Path

    @property
    def programs(self) -> Path:
        return self.venv / "bin"

    def environ(self) -> dict[str, str]:
        path = f"{self.programs}:{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}"
        return {
            "PATH": path,
            "HOME": str(self.home),
            "USER": "olive",
            "LANG": "C.UTF-8",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }

    def run(self, *argv: str, cwd: Path, ok: bool = True, timeout_s: float = 600, text: str | None = None) -> str:
        """A command as a user types it; what it printed, both outputs together."""
        done = subprocess.run(
            argv, cwd=cwd, env=self.environ(), capture_output=True, text=True, timeout=timeout_s, check=False,
            **({"input": text} if text is not None else {"stdin": subprocess.DEVNULL}),
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, f"{argv} ended with {done.returncode}:\n{said}"
        return said


def install(wheel: Path, folder: Path) -> Installed:
    """A fresh virtual environment in ``folder`` with the wheel, and pyinfra's and pytest's commands."""
    venv, home = folder / "venv", folder / "home"
    home.mkdir(parents=True)
    for argv in (
        [sys.executable, "-m", "venv", "--without-pip", str(venv)],
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(venv),
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
            str(wheel),
        ],
    ):
        subprocess.run(argv, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S, stdin=subprocess.DEVNULL)
    [site] = venv.glob("lib/python*/site-packages")
    # Named as a path, not as a site: its own .pth files, with the checkout in one of them, are not read.
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    for script in entry_points(group="console_scripts"):
        if script.name in ("pyinfra", "pytest"):
            path = venv / "bin" / script.name
            path.write_text(_SCRIPT.format(python=venv / "bin" / "python", module=script.module, name=script.attr))
            path.chmod(0o755)
    (home / ".gitconfig").write_text("[user]\n\tname = olive\n\temail = olive@example.invalid\n")
    return Installed(venv, home)


def commands_in(readme: str) -> list[str]:
    """The next five commands, word for word: the first block of shell in the README, without its remarks."""
    block = readme.split("```sh\n", 1)[1].split("```", 1)[0]
    return [line.split("   #")[0].rstrip() for line in block.splitlines() if line.strip()]
