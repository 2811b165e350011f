"""A worker's life in whatever process it has got: a child of the server, or an actor of a Ray cluster."""

from __future__ import annotations

import importlib
import select
import signal
import threading
import time
import traceback
from typing import Any

from amoe.cluster.control_listener import connect_control
from amoe.cluster.process import LaunchSpec, TcpControl, title_of
from amoe.engine.control import SocketControlPort
from amoe.engine.cpus import cpu_set, keep_to_cpus
from amoe.engine.messages import Failed, Stop, Topology
from amoe.engine.shared_control import SharedControlPort, control_port
from amoe.errors import AmoeError, EngineDeadError
from amoe.logs import configure
from amoe.transport.base import Transport
from amoe.transport.opening import open_transport

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
TOPOLOGY_TIMEOUT_S = 60.0

Port = SocketControlPort | SharedControlPort


def run_worker(spec: LaunchSpec) -> int:
    """Serve until the server says `Stop` or goes away; returns the exit status, see `amoe.cluster.worker_main`.

    Raises:
        AmoeError: the server cannot be reached.
    """
    configure(spec.logs, title_of(spec.config.placement, spec.rank))
    control = _open_control(spec)
    is_built = False
    transport: Transport | None = None
    try:
        if cpus := cpu_set(spec.config, spec.rank):
            keep_to_cpus(cpus)  # before there is memory worth having near
        topology = _first_topology(control) if spec.is_late else None
        if spec.is_late and topology is None:
            return 0
        transport = open_transport(spec.transport, spec.rank, spec.incarnation)
        worker = _build(spec, transport, control, topology)
        is_built = True
        # Until here SIGTERM ends the process at once: there is nothing to leave orderly.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda _number, _frame: control.interrupt())
        worker.run()
        return 0
    except Exception as error:
        if isinstance(error, AmoeError) and not is_built:
            control.send(Failed(str(error), user_error=True))
            return EXIT_USER_ERROR
        traceback.print_exc()
        control.send(Failed(f"{type(error).__name__}: {error}", user_error=False))
        return EXIT_FAILURE
    finally:
        if transport is not None:
            transport.close()
        control.close()


def _open_control(spec: LaunchSpec) -> Port:
    if isinstance(spec.control, TcpControl):
        return SocketControlPort(connect_control(spec.control, spec.rank, spec.incarnation))
    return control_port(spec.control.fd, spec.control.door_fd)


def _first_topology(control: Port) -> Topology | None:
    """What the server says first to a worker that comes late; None: it wants the worker to leave.

    Raises:
        EngineDeadError: it has said nothing for a long time.
    """
    deadline = time.monotonic() + TOPOLOGY_TIMEOUT_S
    while (seconds := deadline - time.monotonic()) > 0:
        select.select([control.fileno()], [], [], seconds)
        for message in control.receive():
            if isinstance(message, Topology):
                return message
            if isinstance(message, Stop):
                return None
    raise EngineDeadError(f"the server has told no topology for {TOPOLOGY_TIMEOUT_S:g} s")


def _build(spec: LaunchSpec, transport: Transport, control: Port, topology: Topology | None) -> Any:
    module, _, function = spec.entry.partition(":")
    build_worker = getattr(importlib.import_module(module), function)
    if topology is None:
        return build_worker(spec.config, spec.rank, transport, control)
    from amoe.engine.assembly import Rejoin

    return build_worker(
        spec.config, spec.rank, transport, control, rejoin=Rejoin(incarnation=spec.incarnation, topology=topology)
    )
