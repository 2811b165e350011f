"""Errors in the words of the user's own request, where it has been translated into a chat completion."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from amoe.errors import RequestError


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What the fields of a `ChatCompletionRequest` are called in the request that it was made of.

    Attributes:
        names: own path by chat path, such as `input.3` by `messages.1`. It holds for everything below, too; paths that
            are not covered are the same in both.
    """

    names: Mapping[str, str] = field(default_factory=dict)

    def own(self, path: str) -> str:
        """The user's name of the chat path `path`."""
        known = path
        while known not in self.names:
            known, dot, _ = known.rpartition(".")
            if not dot:
                return path
        return self.names[known] + path[len(known) :]

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Within, errors that name a chat field leave with the user's own name for it.

        Raises:
            RequestError: of the same class as within.
            RequestValidationError: for what pydantic finds in the chat request.
        """
        try:
            yield
        except ValidationError as error:
            raise RequestValidationError([self._relocated(detail) for detail in error.errors()]) from error
        except RequestError as error:
            own = self.own(error.param) if error.param is not None else None
            if error.param is None or own is None or own == error.param:
                raise
            word = rf"(?<![\w.]){re.escape(error.param)}(?!\w)"
            raise type(error)(re.sub(word, lambda _: own, str(error)), own) from error

    def _relocated(self, detail: Mapping[str, object]) -> dict[str, object]:
        location = detail.get("loc")
        parts = location if isinstance(location, tuple) else ()
        # Names that pydantic gives to members of unions are no fields.
        path = ".".join(str(part) for part in parts if not isinstance(part, str) or part.isidentifier())
        own = [int(part) if part.isdigit() else part for part in self.own(path).split(".")]
        return {**detail, "loc": ("body", *own)}
