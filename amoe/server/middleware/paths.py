"""Which route a request asks for."""

from __future__ import annotations

from starlette._utils import get_route_path  # the router's own answer: a guard that had another one would have a hole
from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path of a request's route: without the prefix at which the application is mounted, as by Ray Serve."""
    return get_route_path(scope)
