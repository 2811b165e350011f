"""The cells in which exactness is shown between workers that talk through sockets."""

from __future__ import annotations

from tests.integration.exactness import COUNTS, FACTORS, KERNELS, PLACEMENTS, REPLICAS, Case, make_cases
from tests.pairwise import all_combinations

TRANSPORTS = ("tcp", "distributed")
BETWEEN = [name for name, placement in PLACEMENTS.items() if placement.num_workers > 1]
_REST = [("qwen2_moe", "plain"), ("olmoe", "cached"), ("qwen3_moe", "cached+preempted"), ("mixtral", "preempted")]


def cells(first_kernels: int) -> list[Case]:
    """All schedules and placements of several workers; one architecture and feature for each, in turn.

    Args:
        first_kernels: whose turn it is first, of `KERNELS`; the other ones come next.
    """
    rows = all_combinations({"schedule": FACTORS["schedule"], "count": COUNTS, "placement": BETWEEN})
    # A schedule without a count would come once for each of the counts.
    has_count = ("waves", "lockstep")
    rows = [row for row in rows if row["schedule"] in has_count or row["count"] == COUNTS[0]]
    rest = [
        {
            "arch": _REST[n % 4][0],
            "feature": _REST[n % 4][1],
            "variant": n % 3,
            "replicas": REPLICAS[n % 2],
            "kernels": KERNELS[(n // len(BETWEEN) + first_kernels) % len(KERNELS)],
        }
        for n in range(len(rows))
    ]
    return make_cases([{**row, **more} for row, more in zip(rows, rest, strict=True)])


# Each schedule and placement over each transport, with the native kernels over one of them and torch's over the other.
CELLS = [(case, transport) for number, transport in enumerate(TRANSPORTS) for case in cells(number)]
