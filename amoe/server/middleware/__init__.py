"""What every request passes on its way to a route. Plain ASGI, so that a client that goes away is noticed at once.

From the outside: `RequestScope` (id, log, trace, last resort for errors), CORS, `ApiKeyGuard`, `BodyLimit`.
"""
