"""The hosts named with --data destroy=HOST[,HOST], and only these: deleted in the cloud, forgotten here."""

from clawdlets_ops.deploys import destroy

destroy()
