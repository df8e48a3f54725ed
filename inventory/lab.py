"""The same fleet on the lab that `clawdlets lab up` started in this checkout."""

import os
from pathlib import Path

from clawdlets_ops.pyinfra_plugin.inventory import fleet_hosts

hosts = fleet_hosts(Path(__file__).parents[1], os.environ, environment="lab")
