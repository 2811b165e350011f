"""The live view: its files, their headers, and what `/live` tells."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from amoe.server.page.assets import load_assets
from tests.unit.server.conftest import Harness

ASSETS = load_assets()


class Links(HTMLParser):
    """Everything that a document loads, and every inline script, style or handler."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.inline: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.urls += [str(given[name]) for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag in ("script", "style") and "src" not in given:
            self.inline.append(tag)
        self.ids += [str(given["id"])] if "id" in given else []
        self.labelled += [str(given["for"])] if tag == "label" and "for" in given else []


def parse_page() -> Links:
    links = Links()
    links.feed(ASSETS["index.html"].body.decode())
    return links


async def test_page_has_a_strict_policy(server: Harness):
    response = await server.http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_page_loads_its_own_files_only(server: Harness):
    links = parse_page()
    assert not links.inline, "the policy forbids these"
    assert len(links.ids) == len(set(links.ids))
    assert set(links.labelled) <= set(links.ids)
    for url in links.urls:
        assert (await server.http.get(f"/{url}")).status_code == 200, url
    for name, asset in ASSETS.items():
        text = asset.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "//cdn" not in text and not re.search(r"https?://|@import|url\(", text), name


async def test_scripts_import_what_there_is():
    for name, asset in ASSETS.items():
        for imported in re.findall(r'from "\./([^"]+)"', asset.body.decode()):
            assert imported in ASSETS, f"{name} imports {imported}"


async def test_scripts_use_ids_that_the_page_has():
    ids = set(parse_page().ids)
    for name, asset in ASSETS.items():
        if name.endswith(".js"):
            used = set(re.findall(r'(?:find|getElementById|set)\("([a-z0-9-]+)"', asset.body.decode()))
            assert used <= ids, f"{name}: {used - ids}"


def test_scripts_never_write_markup():
    for name, asset in ASSETS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", asset.body.decode()), (
            name
        )


@pytest.mark.parametrize(
    ("name", "media_type"), [("main.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")]
)
async def test_files_have_types_and_tags(server: Harness, name: str, media_type: str):
    response = await server.http.get(f"/page/{name}")
    assert response.headers["content-type"].split(";")[0] == media_type
    assert response.headers["cache-control"] == "no-cache"
    again = await server.http.get(f"/page/{name}", headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    weak = f'"other", W/{response.headers["etag"]}'
    assert (await server.http.get(f"/page/{name}", headers={"if-none-match": weak})).status_code == 304
    assert (await server.http.get(f"/page/{name}", headers={"if-none-match": '"other"'})).status_code == 200
    assert (await server.http.head(f"/page/{name}")).status_code == 200


@pytest.mark.parametrize("path", ["/page/none.js", "/page/..%2froutes.py", "/page/%2e%2e/routes.py", "/page/", "/page"])
async def test_other_files_are_not_there(server: Harness, path: str):
    assert (await server.http.get(path)).status_code == 404


async def test_live_tells_nothing_of_requests(server: Harness):
    await server.complete(prompt="a secret", max_tokens=4, user="somebody", request_id="whose")
    response = await server.http.get("/live")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    view = response.json()
    assert (view["model"], view["started"], view["healthy"]) == ("fake", 1, True)
    assert view["requests"]["open"] == 0
    assert view["workers"] == [] and view["experts"] is None
    assert "secret" not in response.text and "somebody" not in response.text and "whose" not in response.text
