"""The red tests of confined bots, on a real machine: each seeded fault turns exactly the checks red that are about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from clawdlets_ops.lab.scenario import Scenario
from tests.lab.conftest import ROOT, TAILNET
from tests.lab.test_verify_red import Seed

# Ten judgements by the whole suite: told with LONG=1. Good and bad evidence is judged in tests/unit/test_verify_egress.py.
pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]

UNIT = "clawdlets-bot-maren.service"
DROP_IN = f"/run/systemd/system/{UNIT}.d"
RELOAD = f"systemctl daemon-reload; systemctl restart {UNIT}"
SQUID = "/etc/clawdlets/egress/squid.conf"
READY = "until ss -Hltn | grep -q :3129; do sleep 0.1; done"
UNDO_SQUID = f"cp -p /run/kept-squid {SQUID}; systemctl restart clawdlets-egress-proxy; {READY}"


def drop_in(text: str) -> str:
    return f"mkdir -p {DROP_IN}; printf '[Service]\\n{text}\\n' >{DROP_IN}/seed.conf; {RELOAD}"


UNDO_UNIT = f"rm -r {DROP_IN}; {RELOAD}"
SEEDS = [
    Seed("a bot's unit that may reach everything", "PXY-01", drop_in("IPAddressAllow=any"), UNDO_UNIT),
    Seed("a bot's unit that may reach all of loopback", "PXY-01", drop_in("IPAddressAllow=localhost"), UNDO_UNIT),
    Seed("rules that forget the bots' users", "PXY-02", "nft flush chain inet clawdlets-egress bot", "systemctl reload clawdlets-egress"),
    Seed("a proxy that is everybody's", "PXY-03", f"cp -p {SQUID} /run/kept-squid; sed -i 's/^http_port 127.0.0.1:3128/http_port 3128/' {SQUID}; systemctl restart clawdlets-egress-proxy; {READY}", UNDO_SQUID),
    Seed("a proxy without its list", "PXY-04", f"cp -p {SQUID} /run/kept-squid; sed -i 's/^http_access deny from_bot-maren.*//; s/^http_access deny inside//' {SQUID}; systemctl restart clawdlets-egress-proxy; {READY}", UNDO_SQUID),
    Seed("an entry that nobody declared", "PXY-04", "echo .evil.example >>/etc/clawdlets/egress/bot-maren.domains", "sed -i /evil/d /etc/clawdlets/egress/bot-maren.domains"),
    Seed("a bot that may ask the system bus", "PXY-05", drop_in("InaccessiblePaths="), UNDO_UNIT),
    Seed("a bot that may make packets of its own", "PXY-06", drop_in("RestrictAddressFamilies=AF_PACKET"), UNDO_UNIT),
    Seed("a bot that may use sudo", "PXY-06", "echo 'bot-maren ALL=(root) NOPASSWD: /bin/true' >/etc/sudoers.d/seed", "rm /etc/sudoers.d/seed"),
    Seed("a bot whose session lingers", "PXY-06", "mkdir -p /var/lib/systemd/linger; touch /var/lib/systemd/linger/bot-maren", "rm /var/lib/systemd/linger/bot-maren"),
    Seed("a bot with a job of cron", "PXY-06", "echo '@daily bot-maren /bin/true' >/etc/cron.d/seed", "rm /etc/cron.d/seed"),
    Seed("a bot that may command a container engine", "PXY-05 PXY-06", "systemd-run -q --unit=engine python3 -c 'import os, socket as s, time as t; x = s.socket(s.AF_UNIX); x.bind(\"/run/docker.sock\"); os.chmod(\"/run/docker.sock\", 0o666); x.listen(); t.sleep(900)'; until [ -S /run/docker.sock ]; do sleep 0.1; done", "systemctl stop engine; rm /run/docker.sock"),
    Seed("a bot that starts without the rules", "PXY-07", f"cp -p /etc/systemd/system/{UNIT} /run/kept-unit; sed -i /^Requires=/d /etc/systemd/system/{UNIT}; {RELOAD}", f"cp -p /run/kept-unit /etc/systemd/system/{UNIT}; {RELOAD}"),
    Seed("a list that lost its entry", "PXY-08", "sed -i /api/d /etc/clawdlets/egress/bot-maren.domains", "echo api.example.net >>/etc/clawdlets/egress/bot-maren.domains"),
]  # fmt: skip


class Bench:
    """The project's one host, bootstrapped, with ways to break it and to judge it."""

    def __init__(self, lab: Scenario) -> None:
        self.lab = lab

    def sh(self, script: str) -> None:
        self.lab.guest(
            "alpha", "sh", "-euc", f"PATH=/run/current-system/sw/bin:/usr/sbin:/usr/bin:/sbin:/bin; {script}"
        ).check()

    def judge(self) -> dict[str, str]:
        """check → what was seen, of everything that did not pass, as far as the host itself is judged."""
        return {
            one.check: f"{one.state}: {one.observed}"
            for one in self.lab.verify("alpha")
            if str(one.state) in ("fail", "unknown")
        }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    def confine(document: dict[str, Any]) -> None:
        document["hosts"]["alpha"]["egress"] = {
            "mode": "proxy-allowlist",
            "allowedDomains": [".allowed.example", "api.example.net"],
        }

    with Scenario(ROOT, folder=tmp_path_factory.mktemp("project"), environ=os.environ, tailnet=TAILNET) as lab:
        lab.declare(confine)
        lab.bootstrap("alpha")
        yield Bench(lab)


@pytest.mark.parametrize("seed", [pytest.param(seed, id=seed.what.replace(" ", "-")) for seed in SEEDS])
def test_a_seeded_fault_turns_exactly_its_checks_red(bench: Bench, seed: Seed) -> None:
    bench.sh(seed.do)
    try:
        found = bench.judge()
    finally:
        bench.sh(seed.undo)
    assert {check for check, text in found.items() if text.startswith("fail")} == set(seed.checks.split()), found
    assert not [text for text in found.values() if text.startswith("unknown")], found


def test_mended_nothing_is_red(bench: Bench) -> None:
    assert bench.judge() == {}
