"""Series of the HTTP server, under the names that FastAPI's instrumentators have made common."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from amoe.metrics.buckets import HTTP_BUCKETS, LAG_BUCKETS, PREFIX

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class HttpMetrics:
    """What the HTTP side counts. Handlers are route templates, never paths, so that series stay few."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests", "HTTP requests answered.", ("handler", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Seconds from a request's head to the end of its answer, streams included.",
            ("handler", "method"),
            buckets=HTTP_BUCKETS,
            registry=registry,
        )
        self._open = Gauge(
            f"{PREFIX}http_requests_open",
            "HTTP requests being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._connections = Gauge(
            f"{PREFIX}http_connections_open", "Open HTTP connections.", registry=registry, multiprocess_mode="livesum"
        )
        self._count_connections: Callable[[], int] = lambda: 0
        self._lag = Histogram(
            f"{PREFIX}event_loop_lag_seconds",
            "Seconds by which a timer of the API's event loop was late.",
            buckets=LAG_BUCKETS,
            registry=registry,
        )

    def began(self) -> None:
        """A request's head is here."""
        self._open.inc()

    def ended(self, handler: str | None, method: str, status: int, seconds: float) -> None:
        """A request is answered, or its client has gone.

        Args:
            handler: template of its route; None: it has reached none.
            status: 0 if no answer had begun.
        """
        self._open.dec()
        labels = (handler or "none", method if method in _METHODS else "other")
        self._requests.labels(*labels, f"{status // 100}xx" if status else "none").inc()
        self._seconds.labels(*labels).observe(seconds)

    def lagged(self, seconds: float) -> None:
        """A timer of the event loop was late."""
        self._lag.observe(max(0.0, seconds))
        self.refresh()

    def watch_connections(self, count: Callable[[], int]) -> None:
        """Ask `count` for the number of open connections at every scrape, and now and then."""
        self._count_connections = count

    def refresh(self) -> None:
        """Before a scrape, here or in another API process."""
        self._connections.set(self._count_connections())
