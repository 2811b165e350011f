"""Every error that amoe raises on purpose.

    AmoeError
    ├── ConfigError            a flag or a configuration value that cannot work
    ├── CheckpointError        a checkpoint that cannot be served; the message names file, tensor or option
    ├── RequestError           a request that cannot be served (HTTP 400)
    │   └── QuotingError       ... whose message may quote the prompt
    ├── UnfinishedError        a change of the cluster that began, and came to nothing or to half; it may be asked again
    ├── EngineOverloadedError  the waiting queue is full (HTTP 503 with Retry-After)
    ├── EngineDeadError        a worker died or hangs; nothing can be served any more (HTTP 503)
    └── TransportError         a peer broke the wire protocol or went away

The message of each is written for the person who has to act on it.
"""


class AmoeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(AmoeError):
    """A flag or a configuration value that cannot work."""


class CheckpointError(AmoeError):
    """A checkpoint that cannot be served. The message names the file, tensor or option."""


class RequestError(AmoeError):
    """A request that cannot be served. `param` names the offending field, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QuotingError(RequestError):
    """A request that cannot be served, for a reason that may quote the prompt: what follows the message's first colon.
    That is for the user, and not for logs."""


class UnfinishedError(AmoeError):
    """A change of the cluster that began, and came to nothing or to half. The message says what is true now."""


class EngineOverloadedError(AmoeError):
    """The waiting queue is full. `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(AmoeError):
    """A worker died or hangs."""


class TransportError(AmoeError):
    """A peer broke the wire protocol or went away."""
