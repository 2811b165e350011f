"""`amoe` with workers whose links can be cut and delayed.

AMOE_CHAOS_LINKS=FILE python -m benchmarks.chaos.serve serve [MODEL] [FLAGS OF amoe serve]
"""

from __future__ import annotations

import sys

from amoe import cli
from amoe.cluster.opening import open_cluster

ENTRY = "benchmarks.chaos.worker:build_worker"

if __name__ == "__main__":
    defaults = open_cluster.__kwdefaults__
    assert defaults is not None
    defaults["entry"] = ENTRY
    sys.exit(cli.main())
