"""Destroying a host: only the one that was named, only what is ours, and nothing of it left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcloud
import pytest
from hcloud.images import Image
from hcloud.server_types import ServerType

from clawdlets_ops import provision
from clawdlets_ops.errors import ClawdletsError, CloudError, PlanRefused
from clawdlets_ops.hetzner import KINDS
from tests.integration.provisioning import TOKEN, Site, site_in

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

EVERYTHING: dict[str, Any] = {"reservedIps": True, "volumes": {"data": {}}, "placementGroup": "apart"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_in(tmp_path) as made:
        yield made


def destroy(site: Site, host: str = "alpha", named: str | None = None) -> list[str]:
    project = site.project()
    gone = provision.destroy(
        project, host, named=named or host, runner=site.runner(), cloud=site.api, say=site.said.append
    )
    return [one.kind for one in gone]


def names(site: Site) -> dict[str, list[str]]:
    return {kind: sorted(row["name"] for row in site.rows(kind)) for kind in KINDS}


def clawdlets(site: Site, *words: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", "from clawdlets_ops.cli import main; main()", "--project", str(site.root), *words]
    return subprocess.run(argv, env=site.environ, input=typed, capture_output=True, text=True, timeout=120, check=False)


def test_the_named_host_goes_with_all_that_is_its_own_and_the_others_stay(site: Site) -> None:
    site.declare("alpha", **EVERYTHING)
    site.declare("beta", placementGroup="apart")
    site.provision("alpha")
    site.provision("beta")
    payload = site.layout.extra_files("alpha")
    payload.mkdir(parents=True)
    pin = site.layout.host_ssh_public_key("alpha")
    pin.parent.mkdir(parents=True, exist_ok=True)
    pin.write_text("canary\n")
    # It has left the fleet file, and its state is lost: its labels are enough.
    document = json.loads(site.layout.fleet_file.read_text())
    del document["hosts"]["alpha"]
    site.layout.fleet_file.write_text(json.dumps(document))
    shutil.rmtree(site.folder("alpha"))
    before = len(site.changed())

    shown = clawdlets(site, "destroy", "alpha", "--dry")
    assert (shown.returncode, "delete the server alpha" in shown.stdout) == (0, True)
    for typed in ("", "beta\n"):
        refused = clawdlets(site, "destroy", "alpha", typed=typed)
        assert refused.returncode in (1, 130), refused.stderr
    with pytest.raises(PlanRefused, match="was not named"):
        destroy(site, "alpha", named="beta")
    assert len(site.changed()) == before

    done = clawdlets(site, "destroy", "alpha", typed="alpha\n")
    assert done.returncode == 0, done.stderr
    assert "nothing labelled managed-by=clawdlets,clawdlets-host=alpha is left" in done.stdout
    left = names(site)
    assert (left["servers"], left["firewalls"], left["volumes"]) == (["beta"], ["beta-edge"], [])
    # The group is beta's now, and beta has a key of its own to be made with again.
    assert site.rows("placement_groups")[0]["labels"]["clawdlets-host"] == "beta"
    assert not payload.exists()
    assert not pin.exists()
    assert not (site.folder("alpha") / "terraform.tfstate").exists()
    site.provision("beta", refresh=True)
    assert any("adopt hcloud_placement_group.apart" in said for said in site.said)

    again = clawdlets(site, "destroy", "alpha", "--confirm", "alpha")
    assert (again.returncode, again.stderr.strip()) == (0, "nothing to do")
    assert destroy(site, "beta") == ["servers", "firewalls", "placement_groups", "ssh_keys"]
    assert names(site) == {kind: [] for kind in KINDS}


@pytest.mark.parametrize(
    "fault",
    [
        "answer 503 DELETE /servers/* times=1",
        "lost-answer DELETE /servers/* times=1",
        "answer locked POST /servers/*/actions/change_protection times=1",
    ],
)
def test_an_interrupted_destruction_is_finished_by_the_next(site: Site, fault: str) -> None:
    site.declare(volumes={"data": {}})
    site.provision()
    site.fault(fault)
    with pytest.raises(ClawdletsError):
        destroy(site)
    site.book.clear(None)
    destroy(site)
    assert names(site) == {kind: [] for kind in KINDS}


def test_what_is_not_ours_is_not_touched(site: Site) -> None:
    client = hcloud.Client(TOKEN, api_endpoint=site.emulator.endpoint, poll_interval=0.02, timeout=10)
    client.servers.create("alpha", ServerType("cx23"), Image(name="debian-12")).action.wait_until_finished()
    with pytest.raises(CloudError, match="did not make"):
        destroy(site)
    assert [line for line in site.changed() if "DELETE" in line] == []
    client._client._session.close()
    # A volume in the state whose label somebody has taken off: the plan would delete it, and is refused.
    site.declare("beta", volumes={"data": {}})
    site.provision("beta")
    volume = site.rows("volumes")[0]
    site.cloud.update("volumes", volume["id"], {"labels": {"kept": "yes"}})
    with pytest.raises(PlanRefused, match="hcloud_volume"):
        destroy(site, "beta")
    assert [row["id"] for row in site.rows("volumes")] == [volume["id"]]
    assert {row["name"] for row in site.rows("servers")} == {"alpha", "beta"}


def test_the_deploy_destroys_only_hosts_that_are_named(site: Site) -> None:
    root = Path(__file__).parents[2]
    for name in ("deploys", "inventory"):
        shutil.copytree(root / name, site.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "init", "-q", str(site.root)], check=True)
    site.declare("beta")
    site.provision("alpha")
    site.provision("beta")
    argv = [str(Path(sys.executable).parent / "pyinfra"), "-y", "inventory/prod.py", "deploys/destroy.py"]

    def run(*more: str) -> str:
        done = subprocess.run(
            [*argv, *more], cwd=site.root, env=site.environ, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run()
    assert len(site.rows("servers")) == 2
    run("--data", "destroy=beta")
    assert [row["name"] for row in site.rows("servers")] == ["alpha"]
