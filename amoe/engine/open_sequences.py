"""The sequences that the server has given to its workers and that have not ended, and what is generated for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from amoe.engine.accounts import Accounts
from amoe.engine.async_generation import Generation
from amoe.engine.channels import Channels
from amoe.engine.messages import AbortRequests
from amoe.errors import AmoeError, RequestError
from amoe.types import FinishReason, SequenceOutput

logger = logging.getLogger(__name__)


class OpenSequences:
    """By number. Each comes with `add` and goes with exactly one of `close` and `fail`, or with its last output.

    Args:
        channels: to their workers, which are told to stop where they cannot know that a sequence has ended.
        accounts: of all of them.
        on_empty: called when the last one that was open has ended.
    """

    def __init__(self, channels: Channels, accounts: Accounts, on_empty: Callable[[], None]) -> None:
        self._channels = channels
        self._accounts = accounts
        self._open: dict[int, Generation] = {}
        self._on_empty = on_empty

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Generation]:
        """Those that are open now: they may end meanwhile."""
        return iter(list(self._open.values()))

    def __contains__(self, generation: Generation) -> bool:
        return generation.request_id in self._open

    def add(self, generation: Generation, *, is_first: bool) -> None:
        """A sequence has been sent to its worker; the first one of its prompt has it computed."""
        self._open[generation.request_id] = generation
        self._accounts.open(generation, is_first=is_first)

    def close(self, generation: Generation, reason: FinishReason) -> None:
        """A sequence ends now; whoever calls tells its reader."""
        del self._open[generation.request_id]
        generation.finish_reason = reason
        if not self._open:
            self._on_empty()
        self._accounts.close(generation, reason)

    def fail(self, generation: Generation, error: AmoeError) -> None:
        """A sequence ends now, with an error for its reader."""
        self.close(generation, "error")
        generation.fail(error)

    def on_output(self, rank: int, output: SequenceOutput) -> None:
        """A worker has generated something for a sequence."""
        generation = self._open.get(output.request_id)
        if generation is None or generation.rank != rank:
            return  # aborted, or ended by a stop string, while the worker was still at it
        try:
            self._take(generation, output)
        except Exception:  # of ours: it must not cost the worker its life, and then the next one
            logger.exception("what worker %d has generated for a request cannot be handled", rank)
            if generation in self:
                self.close(generation, "error")
            self._channels.send(rank, AbortRequests([generation.request_id]))
            generation.fail(AmoeError("the server could not handle what was generated: its log says why"))

    def _take(self, generation: Generation, output: SequenceOutput) -> None:
        if (delta := generation.state.advance(output)) is None:
            return
        if output.times is not None:
            generation.take_times(output.times)
        if delta.token_ids:
            self._accounts.count_tokens(generation, delta)
        if delta.finish_reason is not None:
            self.close(generation, delta.finish_reason)
            if output.finish_reason is None:  # a stop string, which the worker does not know of
                self._channels.send(generation.rank, AbortRequests([generation.request_id]))
        if delta.finish_reason == "error":
            blame = RequestError(output.error) if output.error else AmoeError("the worker could not serve the request")
            generation.fail(blame)
        else:
            generation.deliver(delta)
