"""Lockstep: every device runs the same fixed sequence of blocks, one wave after the other within each layer.

One wave is expert parallelism with a barrier at every dispatch and combine; two are two-batch overlap (DeepSeek's, as
in SGLang and vLLM), or ping-pong micro-batches where attention and experts are disaggregated (MegaScale-Infer). As
strong as could be: host time is nothing (captured graphs), the all-to-all is ideal (each device waits for the slowest
sender and for its own ports, for nobody else), and it takes nothing from the kernels.
"""

from __future__ import annotations

import numpy as np

from amoe.profiles.links import Fabric
from amoe.sim.flow.deployment import FloatArray
from amoe.sim.flow.loads import Loads
from amoe.sim.flow.result import FlowResult, summarise


class AllToAll:
    """When the rows of a collective are there."""

    def __init__(self, fabric: Fabric, senders: range, receivers: range, row_bytes: float, *, num_devices: int) -> None:
        node = fabric.same_node(num_devices)[np.ix_(list(senders), list(receivers))]
        own = np.array(list(senders))[:, None] == np.array(list(receivers))[None, :]
        self._ports = ((node & ~own, fabric.intra), (~node, fabric.inter))
        self._row_bytes = row_bytes

    def arrival(self, sent: FloatArray, rows: FloatArray) -> FloatArray:
        """[R] when each receiver may go on. sent: [S] when senders had their rows; rows: [S, R]."""
        ready = np.full(rows.shape[1], sent.max())
        for mask, link in self._ports:
            if not mask.any():
                continue
            seconds = np.where(mask, rows, 0.0) * (self._row_bytes / link.bandwidth)
            leaving = (sent + seconds.sum(axis=1)).max() + link.latency_s
            taking_in = sent.min() + link.latency_s + seconds.sum(axis=0)
            np.maximum(ready, np.maximum(leaving, taking_in), out=ready)
        return ready


def march(loads: Loads, *, num_iterations: int = 12, num_warmup: int = 2) -> FlowResult:
    """Simulate lockstep with as many waves as `loads` has."""
    deployment = loads.deployment
    sizes, num_waves = deployment.sizes, loads.tokens.shape[1]
    homes, owners = list(deployment.homes), list(deployment.owners)
    exchange = (deployment.fabric, deployment.homes, deployment.owners)
    back = (deployment.fabric, deployment.owners, deployment.homes)
    dispatch = AllToAll(*exchange, deployment.row_bytes, num_devices=deployment.num_devices)
    combine = AllToAll(*back, deployment.row_bytes, num_devices=deployment.num_devices)
    attention, head = loads.attention(), loads.head()
    free = np.zeros(deployment.num_devices)
    busy = np.zeros(deployment.num_devices)
    ready = np.zeros((num_waves, len(homes)))  # when a wave may run its next attention block
    finished = np.zeros((num_iterations, len(homes), num_waves))

    def run(devices: list[int], start: FloatArray, seconds: FloatArray) -> FloatArray:
        end = np.maximum(free[devices], start) + seconds
        free[devices] = end
        busy[devices] += seconds
        return end

    for iteration in range(num_iterations):
        for layer in range(sizes.num_layers):
            arrived = np.zeros((num_waves, len(owners)))
            for wave in range(num_waves):
                ready[wave] = run(homes, ready[wave], attention[layer, :, wave])
                if layer >= sizes.num_dense_layers:
                    rows = loads.layer(iteration, layer).rows[:, wave]
                    arrived[wave] = dispatch.arrival(ready[wave], rows)
            if layer < sizes.num_dense_layers:
                continue
            load = loads.layer(iteration, layer)
            for wave in range(num_waves):
                end = run(owners, arrived[wave], load.seconds[wave])
                ready[wave] = combine.arrival(end, load.rows[:, wave].T)
        for wave in range(num_waves):
            ready[wave] = run(homes, ready[wave], head[:, wave])
            finished[iteration, :, wave] = ready[wave]
    return summarise(loads.tokens, finished, busy, deployment.num_devices, num_warmup)
