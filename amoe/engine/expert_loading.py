"""Expert weights that come and go while a worker serves: `HoldExperts`, carried out beside the worker's loop.

A thread makes the new weights of one layer at a time: it reads what comes from the checkpoint, and lays it beside what
stays (native kernels: in the same memory) or copies that as well (torch's, whose experts of a layer are one tensor: two
copies of one layer then). The loop puts them in force between two turns, so no step ever sees half of them. What comes
is there before anything goes, which bounds what homes have to know: a table of owners may change at any time in
between. The thread, and those that it starts, leave the processor to the loop where both want it.

What goes, goes late: while a token in the queue of its layer needs it, it stays. A pair may still come too late, sent
by a table that is no longer in force. Then its token is not answered at all, rather than wrongly; its home sends it
again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from amoe.core.experts import ExpertsCore
from amoe.core.steps import ExpertsStep
from amoe.engine.messages import HoldExperts, Holding, LayerHeld, ToServer
from amoe.types import BoolArray

logger = logging.getLogger(__name__)

# A third of the loop's weight. With much less, a worker whose processor is busy would take minutes for what takes
# seconds, and with Python's lock in hand it would wait for its turn while the loop waits for the lock.
_MORE_NICE = 5


class ExpertStore(Protocol):
    """Weights of experts, of which one layer's can be exchanged for others.

    Attributes:
        parameter_bytes: of all weights that the worker holds.
    """

    @property
    def parameter_bytes(self) -> int: ...

    def held(self) -> Mapping[int, tuple[int, ...]]:
        """{layer: ascending global ids}; layers without experts here may be absent."""
        ...

    def prepare(self, layer: int, ids: tuple[int, ...]) -> Any:
        """Weights of the experts `ids` (ascending) of a layer, for `install`. Called in another thread than the loop's.

        Raises:
            AmoeError: they cannot be had; the message is for the user.
        """
        ...

    def install(self, layer: int, prepared: Any) -> None:
        """Compute with those weights from now on. Called by the loop, between steps."""
        ...

    def discard(self, layer: int) -> None:
        """What `prepare` has made of a layer will not be installed. Called by the loop."""
        ...


class ExpertLoading:
    """Carries out the orders of one worker.

    Args:
        core: whose queues tell which experts are still needed.
        sparse_layers, num_experts: of the model.
        is_late: the worker was added to others that serve already, whose tables it may not match from the start.

    Attributes:
        is_busy: an order is being carried out: `poll` has something to do soon.
    """

    def __init__(
        self, store: ExpertStore, core: ExpertsCore, sparse_layers: Sequence[bool], num_experts: int, *, is_late: bool
    ) -> None:
        self.is_busy = False
        self._store = store
        self._core = core
        self._sparse = tuple(sparse_layers)
        self._num_experts = num_experts
        held = store.held()
        self._held: list[tuple[int, ...]] = [tuple(held.get(layer, ())) for layer in range(len(self._sparse))]
        self._wanted = list(self._held)
        self._order = 0
        self._complaint = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="amoe-expert-loading", initializer=_step_back)
        self._job: tuple[int, tuple[int, ...], Future[Any]] | None = None
        # [num_experts + 1] of a layer, only if a pair of it may come to the wrong place: id -1 reads the last entry.
        self._absent: dict[int, BoolArray] = {}
        if is_late:
            for layer in range(len(self._sparse)):
                self._note(layer)

    # -- orders ------------------------------------------------------------------------------------------------------

    def order(self, message: HoldExperts) -> None:
        """Hold these experts from now on, instead of what the last order said."""
        self._order, self.is_busy = message.order, True
        self._complaint = self._fault(message.experts)
        if not self._complaint:
            self._wanted = [tuple(ids) for ids in message.experts]

    def _fault(self, experts: list[list[int]]) -> str:
        """What is wrong with an order; "" if nothing is."""
        if len(experts) != len(self._sparse):
            return f"the order names {len(experts)} layers, the model has {len(self._sparse)}"
        for layer, ids in enumerate(experts):
            if ids and not self._sparse[layer]:
                return f"layer {layer} has no experts"
            if ids != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < self._num_experts):
                return f"{ids} are no ascending ids of the {self._num_experts} experts of layer {layer}"
        return ""

    def poll(self) -> list[ToServer]:
        """Go on with the order, as far as that takes no time. Once per turn, when no step runs and batches have been
        received. Returns what there is to tell."""
        if not self.is_busy:
            return []
        told: list[ToServer] = []
        if self._job is not None:
            if not self._finish(*self._job):
                return []
            told.append(LayerHeld(self._order))
        change = None if self._complaint else self._next_change()
        if change is not None:
            layer, ids = change
            self._job = (layer, ids, self._thread.submit(self._store.prepare, layer, ids))
            return told
        self.is_busy = False
        if self._complaint:
            logger.error("experts could not be loaded: %s", self._complaint)
        return [Holding(self._order, self._store.parameter_bytes, self._complaint)]

    def _finish(self, layer: int, ids: tuple[int, ...], future: Future[Any]) -> bool:
        """Put in place what the thread has made. False: it has not made it yet, or somebody still needs what goes."""
        if not future.done():
            return False
        error = future.exception()
        gone = self._mask(set(self._held[layer]) - set(ids))
        if error is None and gone.any() and self._core.awaits(layer, gone):
            return False
        self._job = None
        if error is not None:
            self._complaint = str(error) or type(error).__name__
        elif self._is_on_the_way(layer, set(ids)):
            self._store.install(layer, future.result())
            self._held[layer] = ids
            self._note(layer)
        else:
            self._store.discard(layer)
        return True

    def _is_on_the_way(self, layer: int, ids: set[int]) -> bool:
        """From what is held to what is wanted; else a later order has overtaken the one that asked for `ids`."""
        held, wanted = set(self._held[layer]), set(self._wanted[layer])
        return held & wanted <= ids <= held | wanted

    def _next_change(self) -> tuple[int, tuple[int, ...]] | None:
        """(layer, what it is to hold): first whoever comes, then whoever goes."""
        both = [tuple(sorted({*held, *wanted})) for held, wanted in zip(self._held, self._wanted, strict=True)]
        for targets in (both, self._wanted):
            for layer, target in enumerate(targets):
                if target != self._held[layer]:
                    return layer, target
        return None

    def close(self) -> None:
        """Let the thread end; does not wait for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- steps -------------------------------------------------------------------------------------------------------

    def answerable(self, step: ExpertsStep) -> ExpertsStep:
        """`step` without the tokens that have a pair whose expert is not here; they are not answered."""
        absent = self._absent.get(step.block.layer)
        if absent is None or step.num_tokens == 0:
            return step
        lost: BoolArray = np.any(absent[step.expert_ids], axis=1)
        return step.only(~lost) if lost.any() else step

    def _note(self, layer: int) -> None:
        here = self._mask(set(self._held[layer]))
        self._absent[layer] = np.append(~here, False)

    def _mask(self, experts: set[int]) -> BoolArray:
        mask: BoolArray = np.zeros(self._num_experts, np.bool_)
        mask[list(experts)] = True
        return mask


def _step_back() -> None:
    """Let this thread, and those that it will start, have what the loop leaves of a processor that both want."""
    if sys.platform == "linux":  # elsewhere a priority is a whole process's
        with contextlib.suppress(OSError):
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + _MORE_NICE))
