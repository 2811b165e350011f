"""Labels and buckets that several series share: those of vLLM, so that its dashboards can be ported."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from amoe.stats import HistogramSnapshot

PREFIX = "amoe:"
LABELS = ("model_name", "engine")  # `engine`: the rank of the attention worker that served the request

# fmt: off
TTFT_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_BUCKETS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
CHOICE_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (0, 1, 2, 3, 5, 10, 20)
HTTP_BUCKETS = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
RECOVERY_BUCKETS = (.1, .25, .5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600)
LAG_BUCKETS = (.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1)
# fmt: on


def one_two_five_buckets(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    series = (mantissa * 10**exponent for exponent in itertools.count() for mantissa in (1, 2, 5))
    return list(itertools.takewhile(lambda value: value <= limit, series))


def cumulative(snapshot: HistogramSnapshot, edges: tuple[float, ...]) -> list[tuple[str, float]]:
    """The buckets of a worker's histogram, as Prometheus counts them."""
    bounds: Iterator[str] = itertools.chain(map(str, map(float, edges)), ["+Inf"])
    return list(zip(bounds, itertools.accumulate(map(float, snapshot.counts)), strict=True))
