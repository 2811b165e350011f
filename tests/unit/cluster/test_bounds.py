"""Who asks for a cluster that cannot work hears so within half a minute: the limits of each step, added up."""

from __future__ import annotations

import pytest

from amoe.cluster import control_listener
from amoe.cluster.executor import ExecutorOptions
from amoe.cluster.ray_cluster import launcher, names, reach, session

PROMISED_S = 30.0
# What comes before, and works: imports, reading the model's configuration, a connection to Ray, actors that start.
BEFORE_S = 10.0

STEPS = {
    "nobody listens at --ray-address": session.CONNECT_TIMEOUT_S,
    "what listens there is no Ray": session.INIT_TIMEOUT_S,
    "there is too little room": ExecutorOptions().ray_placement_timeout_s,
    "another server has that --deployment-name": names.NAME_TIMEOUT_S,
    "an actor does not start": launcher.TELL_AFTER_S,
    "hosts of workers do not reach each other": max(reach.CONNECT_TIMEOUT_S, reach.ANSWER_TIMEOUT_S),
    "the host of a worker does not reach the server": control_listener.CONNECT_TIMEOUT_S,
}


@pytest.mark.parametrize("step", STEPS)
def test_an_error_comes_in_time(step: str) -> None:
    assert BEFORE_S + STEPS[step] <= PROMISED_S
