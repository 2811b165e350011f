"""The files of the page: read once, served with what a browser must know to run nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import Response

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

# What a model says is untrusted. The page only ever shows it as text; should that fail, the browser still runs no
# script, loads no style and talks to nobody that this server has not served.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: its bytes, their media type, and a tag that changes with them."""

    body: bytes
    media_type: str
    etag: str

    def response(self, if_none_match: str | None = None, status: int = 200) -> Response:
        """The file; 304 where the browser has it already. It asks each time, so that an upgrade shows at once."""
        headers = SECURITY_HEADERS | {"ETag": self.etag, "Cache-Control": "no-cache"}
        known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
        if status == 200 and self.etag in known:
            return Response(status_code=304, headers=headers)
        return Response(self.body, status, headers, self.media_type)


def load_assets() -> dict[str, Asset]:
    """All files of the page, by name."""
    assets = {}
    for file in resources.files("amoe.server.page").joinpath("static").iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            body = file.read_bytes()
            assets[file.name] = Asset(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:24]}"')
    return assets
