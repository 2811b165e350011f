"""Lockstep: every device runs the same fixed sequence of blocks, one wave after the other within each layer.

One wave is expert parallelism with a barrier at every dispatch and combine; two are two-batch overlap (DeepSeek's, as
in SGLang and vLLM), or ping-pong micro-batches where attention and experts are disaggregated (MegaScale-Infer). As
strong as could be: host time is nothing (captured graphs), the all-to-all is ideal (each device waits for the slowest
sender and for its own ports, for nobody else), and it takes nothing from the kernels.
"""

from __future__ import annotations

import numpy as np

from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.sim.flow.loads import Loads
from amoe.sim.flow.result import FlowResult, summarise


class Ports:
    """When every device's ports are free again: collectives of several waves share them."""

    def __init__(self, num_devices: int) -> None:
        self.egress = np.zeros(num_devices)
        self.ingress = np.zeros(num_devices)


class AllToAll:
    """When the rows of a collective are there.

    Args:
        ports: of the links inside a node and between nodes.
    """

    def __init__(self, deployment: Deployment, senders: range, receivers: range, ports: tuple[Ports, Ports]) -> None:
        fabric, self._senders, self._receivers = deployment.fabric, list(senders), list(receivers)
        node = fabric.same_node(deployment.num_devices)[np.ix_(self._senders, self._receivers)]
        own = np.array(self._senders)[:, None] == np.array(self._receivers)[None, :]
        links = ((node & ~own, fabric.intra, ports[0]), (~node, fabric.inter, ports[1]))
        self._links = [(mask, link, port) for mask, link, port in links if mask.any()]
        self._row_bytes = deployment.row_bytes

    def arrival(self, sent: FloatArray, rows: FloatArray) -> FloatArray:
        """[R] when each receiver may go on. sent: [S] when senders had their rows; rows: [S, R]."""
        ready = np.full(rows.shape[1], sent.max())
        for mask, link, port in self._links:
            seconds = np.where(mask, rows, 0.0) * (self._row_bytes / link.bandwidth)
            leaving = np.maximum(sent, port.egress[self._senders]) + seconds.sum(axis=1)
            first = sent.min() + link.latency_s
            taking_in = np.maximum(first, port.ingress[self._receivers]) + seconds.sum(axis=0)
            port.egress[self._senders] = leaving
            port.ingress[self._receivers] = taking_in
            np.maximum(ready, np.maximum(leaving.max() + link.latency_s, taking_in), out=ready)
        return ready


def march(loads: Loads, *, num_iterations: int = 12, num_warmup: int = 2) -> FlowResult:
    """Simulate lockstep with as many waves as `loads` has."""
    deployment = loads.deployment
    sizes, num_waves = deployment.sizes, loads.tokens.shape[1]
    homes, owners = list(deployment.homes), list(deployment.owners)
    ports = (Ports(deployment.num_devices), Ports(deployment.num_devices))
    dispatch = AllToAll(deployment, deployment.homes, deployment.owners, ports)
    combine = AllToAll(deployment, deployment.owners, deployment.homes, ports)
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
