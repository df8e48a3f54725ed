"""The real nixos-anywhere, where a user has it on PATH, installs a lab machine through our wrapper; docs/howto/install.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clawdlets_ops.layout import Layout
from tests.lab.conftest import LabProject

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
FOUND = shutil.which("nixos-anywhere")


@pytest.mark.skipif(FOUND is None, reason="the real nixos-anywhere is not on PATH")
def test_the_real_program_installs_a_lab_machine(project: LabProject) -> None:
    layout, real = Layout(project.root), project.runtime / "lab" / "real"
    settings = layout.env_file.read_text()
    first = f"CLAWDLETS_TOOL_PATH={Path(str(FOUND)).parent}:{real}:"
    changed = settings.replace("CLAWDLETS_TOOL_PATH=", first) + f"CLAWDLETS_KEXEC={real / 'kexec.tar.gz'}\n"
    layout.env_file.write_text(changed)
    for stage in ("payload", "provision", "install"):
        project.run("pyinfra", "-y", "inventory/lab.py", f"deploys/{stage}.py")
    receipt = json.loads(layout.install_receipt("alpha").read_text())
    assert [phase["phase"] for phase in receipt["phases"]] == ["preflight", "kexec", "disko", "install", "reboot"]
    assert str(Path(str(FOUND)).resolve()) in receipt["tools"]["nixos-anywhere"]
    log = (layout.reports("alpha") / "install-install.log").read_text()
    assert "### Installing NixOS ###" in log
    layout.env_file.write_text(settings)
    assert "No changes" in project.run("pyinfra", "-y", "inventory/lab.py", "deploys/install.py").stdout
