"""The fleet on Hetzner Cloud: hosts from fleet/clawdlets.json, token from HCLOUD_TOKEN or .clawdlets/env."""

import os
from pathlib import Path

from clawdlets_ops.pyinfra_plugin.inventory import fleet_hosts

hosts = fleet_hosts(Path(__file__).parents[1], os.environ)
