"""Staggered strict waves, by counts: one event per step, one vector operation per dispatch and per combine.

A worker runs, among its steps that are complete, the one that `policy.wave_order` puts first: the same functions that
the engine calls. Homes start a wave's next iteration when they have finished this one, and wait for no other home.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from amoe.policy.wave_order import WaveOrder
from amoe.profiles.links import LinkProfile
from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.sim.flow.loads import Loads
from amoe.sim.flow.result import FlowResult, summarise

_READY, _DONE, _INVITED = 0, 1, 2
_ATTENTION, _EXPERTS, _HEAD = 0, 1, 2


@dataclass(frozen=True, slots=True)
class HostModel:
    """What the host costs a worker at each step.

    Attributes:
        seconds: of host work per step.
        kind: `serial`: the device waits for it. `ahead`: the next step is prepared while the device computes the one
            before, so that it shows only where that takes less than `seconds`, or where a step becomes ready less
            than `seconds` before the device is free. `hidden`: never (captured graphs, or a kernel that waits on the
            device for its data).
    """

    seconds: float = 0.0
    kind: Literal["serial", "ahead", "hidden"] = "hidden"

    def start(self, ready: float, begun: float, now: float) -> float:
        """When a step starts that became ready at `ready` and is chosen now; the one before it started at `begun`."""
        if self.kind == "serial":
            return now + self.seconds
        return max(now, max(ready, begun) + self.seconds) if self.kind == "ahead" else now


class Port:
    """The ports of all devices on one kind of link: what leaves a device leaves in order, and so comes in."""

    def __init__(self, link: LinkProfile, num_devices: int, row_bytes: float) -> None:
        self._latency = link.latency_s
        self._seconds_per_row = row_bytes / link.bandwidth
        self._egress = np.zeros(num_devices)
        self._ingress = np.zeros(num_devices)

    def send(self, source: int, targets: FloatArray, rows: FloatArray, now: float) -> FloatArray:
        """[n] arrival of `rows` [n] at the devices `targets` [n], sent in this order."""
        seconds = rows * self._seconds_per_row
        start = max(now, float(self._egress[source]))
        leaving = start + np.cumsum(seconds)
        self._egress[source] = leaving[-1]
        # What comes in shares the port from its first byte on: the last of several is there when all their bytes are.
        taken_in = np.maximum(self._ingress[targets], start + self._latency) + seconds
        self._ingress[targets] = taken_in
        return np.maximum(leaving + self._latency, taken_in)


class Network:
    """Arrival times of a step's rows at a fixed set of receivers, in rotated order so that nobody is always last."""

    def __init__(self, deployment: Deployment, intra: Port, inter: Port, receivers: range) -> None:
        same = deployment.fabric.same_node(deployment.num_devices)
        self._plans = []
        for source in range(deployment.num_devices):
            order = [device for device in receivers if device > source] + [d for d in receivers if d < source]
            columns = np.array(order, np.int64) - receivers.start
            devices = np.array(order, np.int64)
            near = same[source, devices] if len(order) else np.zeros(0, np.bool_)
            self._plans.append(((intra, columns[near], devices[near]), (inter, columns[~near], devices[~near])))

    def send(self, source: int, rows: FloatArray, now: float) -> FloatArray:
        """[R] arrival of rows [R] from device `source`; to itself at once."""
        arrival = np.full(len(rows), now)
        for port, columns, devices in self._plans[source]:
            if len(columns):
                arrival[columns] = port.send(source, devices, rows[columns], now)
        return arrival


class WaveSimulator:
    """One run.

    Args:
        order: how steps are ordered and waves held apart.
    """

    def __init__(self, loads: Loads, host: HostModel | None = None, order: WaveOrder | None = None) -> None:
        self._loads = loads
        self._host = host or HostModel()
        deployment = self._deployment = loads.deployment
        self._num_homes, self._num_owners = len(deployment.homes), len(deployment.owners)
        self._num_waves = loads.tokens.shape[1]
        self._num_layers = deployment.sizes.num_layers
        self._order = order or WaveOrder(2 * self._num_layers + 1, self._num_waves)
        self._attention, self._head = loads.attention().tolist(), loads.head().tolist()
        intra = Port(deployment.fabric.intra, deployment.num_devices, deployment.row_bytes)
        inter = Port(deployment.fabric.inter, deployment.num_devices, deployment.row_bytes)
        self._dispatch = Network(deployment, intra, inter, deployment.owners)
        self._combine = Network(deployment, intra, inter, deployment.homes)
        self._participants = (loads.tokens > 0).sum(axis=0)
        fabric = deployment.fabric
        near = fabric.same_node(deployment.num_devices)
        self._latency = np.where(near, fabric.intra.latency_s, fabric.inter.latency_s)  # [N, N]

    def run(self, *, num_iterations: int = 10, num_warmup: int = 3) -> FlowResult:
        """Until every wave of every home has finished `num_iterations` iterations; figures of those after warm-up.

        Whoever is done earlier goes on, so that the last do not have the devices for themselves.
        """
        self._reset(num_iterations)
        for home, wave in np.argwhere(self._loads.tokens > 0).tolist():
            self._begin(0.0, home, wave, 0)
        while self._unfinished:
            now, _, kind, device, step = heapq.heappop(self._events)
            if kind == _READY:
                heapq.heappush(self._waiting[device], (step[0], now, step))
            elif kind == _INVITED:
                self._invite(now, device, *step)
            else:
                self._idle[device] = True
                self._busy[device] += now - self._begun_at[device]
                self._finish(device, step, now)
            if self._idle[device] and self._waiting[device]:
                self._start(device, now)
        return summarise(self._loads.tokens, self._finished, self._busy, self._deployment.num_devices, num_warmup)

    def _reset(self, num_iterations: int) -> None:
        num_devices = self._deployment.num_devices
        self._num_iterations = num_iterations
        self._unfinished = int((self._loads.tokens > 0).sum())
        self._events: list = []
        self._sequence = 0
        self._waiting: list[list] = [[] for _ in range(num_devices)]
        self._idle = [True] * num_devices
        self._begun_at = [-np.inf] * num_devices  # when the latest step of each device started
        self._busy = np.zeros(num_devices)
        self._finished = np.zeros((num_iterations, self._num_homes, self._num_waves))
        self._dispatched: dict[tuple[int, int, int], list] = {}  # (wave, iteration, layer): homes missing, arrivals [D]
        self._missing = np.zeros((self._num_waves, self._num_homes), np.int64)  # owners that have not answered
        self._answered = np.zeros((self._num_waves, self._num_homes))
        # Stage of each wave that is in flight.
        self._position: list[list[int | None]] = [[None] * self._num_waves for _ in range(self._num_homes)]
        self._held: list[dict[int, int]] = [{} for _ in range(self._num_homes)]  # iteration by wave that is held
        # Latest iteration of each wave that a home knows some home, or that any home at all has started.
        self._invitations = np.full((self._num_homes, self._num_waves), -1)
        self._begun = [-1] * self._num_waves

    def _push(self, time: float, kind: int, device: int, step: tuple) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, kind, device, step))

    def _ready(self, time: float, device: int, kind: int, wave: int, iteration: int, layer: int) -> None:
        key = self._order.key(kind == _EXPERTS, 2 * layer + (kind == _EXPERTS), wave, iteration)
        self._push(time, _READY, device, (key, kind, wave, iteration, layer))

    def _begin(self, now: float, home: int, wave: int, iteration: int) -> None:
        """Start an iteration of a wave, or hold it while another wave of this home is too close ahead."""
        stages = [stage for stage in self._position[home] if stage is not None]
        if self._invitations[home, wave] < iteration and self._order.must_hold(stages):
            self._held[home][wave] = iteration
            return
        self._position[home][wave] = 0
        self._ready(now, home, _ATTENTION, wave, iteration, 0)
        if iteration > self._begun[wave] and self._num_waves > 1:
            self._begun[wave] = iteration
            for other in self._deployment.homes:
                self._push(now + self._latency[home, other], _INVITED, other, (wave, iteration))

    def _invite(self, now: float, home: int, wave: int, iteration: int) -> None:
        """Another home has started an iteration of a wave: nobody holds it any more."""
        self._invitations[home, wave] = iteration
        if self._held[home].get(wave, iteration + 1) <= iteration:
            self._begin(now, home, wave, self._held[home].pop(wave))

    def _release(self, now: float, home: int) -> None:
        # Whoever is behind goes first, or a wave could be held by the others in turn for ever.
        for wave, iteration in sorted(self._held[home].items(), key=lambda item: (item[1], item[0])):
            del self._held[home][wave]
            self._begin(now, home, wave, iteration)

    def _move(self, now: float, home: int, wave: int, layer: int) -> None:
        """A wave has run attention(layer)."""
        self._position[home][wave] = 2 * layer + 1
        if self._held[home]:
            self._release(now, home)

    def _start(self, device: int, now: float) -> None:
        _, ready, step = heapq.heappop(self._waiting[device])
        _, kind, wave, iteration, layer = step
        if kind == _EXPERTS:
            seconds = float(self._loads.layer(iteration, layer).seconds[wave, device - self._deployment.owners.start])
        elif kind == _ATTENTION:
            seconds = self._attention[layer][device][wave]
        else:
            seconds = self._head[device][wave]
        start = self._host.start(ready, self._begun_at[device], now)
        self._begun_at[device] = start
        self._idle[device] = False
        self._push(start + seconds, _DONE, device, step)

    def _finish(self, device: int, step: tuple, now: float) -> None:
        _, kind, wave, iteration, layer = step
        if kind == _EXPERTS:
            self._after_experts(device, wave, iteration, layer, now)
            return
        if kind == _HEAD:
            if iteration < self._num_iterations:
                self._finished[iteration, device, wave] = now
                self._unfinished -= iteration + 1 == self._num_iterations
            self._position[device][wave] = None
            self._held[device][wave] = iteration + 1
            self._release(now, device)
            return
        self._move(now, device, wave, layer)
        if layer < self._deployment.sizes.num_dense_layers:
            self._ready(now, device, _ATTENTION, wave, iteration, layer + 1)
        else:
            self._after_attention(device, wave, iteration, layer, now)

    def _after_attention(self, home: int, wave: int, iteration: int, layer: int, now: float) -> None:
        load = self._loads.layer(iteration, layer)
        rows = load.rows[home, wave]
        arrival = self._dispatch.send(home, rows, now)
        self._missing[wave, home] = np.count_nonzero(rows)
        self._answered[wave, home] = now
        if self._missing[wave, home] == 0:
            self._advance(home, wave, iteration, layer, now)
        key = (wave, iteration, layer)
        entry = self._dispatched.get(key)
        if entry is None:
            entry = self._dispatched[key] = [int(self._participants[wave]), arrival]
        else:
            np.maximum(entry[1], arrival, out=entry[1])
        entry[0] -= 1
        if entry[0] == 0:  # the last home has spoken: who has anything to do learns when it will be there
            del self._dispatched[key]
            first = self._deployment.owners.start
            for owner in np.flatnonzero(load.active[wave]).tolist():
                self._ready(float(entry[1][owner]), first + owner, _EXPERTS, wave, iteration, layer)

    def _after_experts(self, device: int, wave: int, iteration: int, layer: int, now: float) -> None:
        rows = self._loads.layer(iteration, layer).rows[:, wave, device - self._deployment.owners.start]
        waiting = rows > 0
        arrival = self._combine.send(device, rows, now)
        answered, missing = self._answered[wave], self._missing[wave]
        np.maximum(answered, np.where(waiting, arrival, 0.0), out=answered)
        missing -= waiting
        for home in np.flatnonzero(waiting & (missing == 0)).tolist():
            self._advance(home, wave, iteration, layer, float(answered[home]))

    def _advance(self, home: int, wave: int, iteration: int, layer: int, time: float) -> None:
        if layer + 1 == self._num_layers:
            self._ready(time, home, _HEAD, wave, iteration, self._num_layers)
        else:
            self._ready(time, home, _ATTENTION, wave, iteration, layer + 1)
