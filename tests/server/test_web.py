import re

from mmrag.server.routes.web import _FOLDER


def test_the_page_and_all_that_it_loads_come_from_here(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    texts = {"": page.text}
    wanted = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text))
    for path in sorted(wanted):
        texts[path] = client.get(path).text
    for path in [p for p in texts if p.endswith(".js")]:
        wanted |= set(re.findall(r'from "([^"]+)"', texts[path]))
    assert {f"/static/{path.name}" for path in _FOLDER.iterdir()} - wanted <= {
        "/static/index.html",
        *(f"/static/{p.name}" for p in _FOLDER.glob("*.js")),
    }
    for path in wanted:
        reply = client.get(path)
        assert reply.status_code == 200, path
        kind = reply.headers["content-type"].split(";")[0]
        assert (
            kind
            == {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[
                path.rsplit(".", 1)[1]
            ]
        )
    assert page.headers["cache-control"] == "no-cache"


def test_the_page_needs_nothing_that_its_policy_forbids():
    """No inline script or style, no HTML strings, no other host."""
    for path in _FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert not addresses, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    page = (_FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page)


def test_static_files_are_those_of_the_page_only(client):
    for name in ("nothing.js", "..%2Fapp.py", "%2e%2e/app.py", "../app.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_the_page_is_open_but_what_it_shows_is_not(make_client):
    client = make_client(api_keys=("a-long-random-key",))
    assert client.get("/").status_code == 200
    assert client.get("/static/main.js").status_code == 200
    assert client.get("/api/collections").status_code == 401
