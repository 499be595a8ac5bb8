import asyncio

import pytest

from mmrag.errors import ConfigError
from mmrag.server.errors import ApiError
from mmrag.server.gate import Gate
from mmrag.server.guard import host_name
from mmrag.server.keys import ApiKeys
from mmrag.server.options import ServerOptions

KEY = "a-long-random-key"
SEARCH = {"query": "eye"}


@pytest.fixture
def locked(make_client):
    return make_client(api_keys=(KEY, "a-second-long-key"))


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": "bearer a-second-long-key"},
        {"X-API-Key": KEY},
    ],
)
def test_a_key_opens_the_api(locked, headers):
    assert locked.post("/api/search", json=SEARCH, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-API-Key": ""}],
)
def test_without_a_right_key_everything_but_health_is_shut(locked, headers):
    for method, path in (
        ("POST", "/api/search"),
        ("GET", "/api/collections"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/api/nothing"),
        ("OPTIONS", "/api/search"),
    ):
        reply = locked.request(method, path, headers=headers)
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
    assert locked.get("/health").status_code == 200
    assert locked.get("/ready").status_code == 200


def test_a_session_stands_for_a_key(locked):
    assert locked.post("/api/session", json={"key": "wrong-key"}).status_code == 401
    reply = locked.post("/api/session", json={"key": KEY})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert KEY not in cookie
    assert locked.get("/api/collections").status_code == 200
    old = dict(locked.cookies)
    locked.delete("/api/session")
    locked.cookies.update(old)
    assert locked.get("/api/collections").status_code == 401


def test_keys_are_kept_as_hashes():
    keys = ApiKeys([KEY])
    token = keys.new_session()
    held = repr(vars(keys))
    assert KEY not in held
    assert token not in held
    assert keys.opens_session(token)
    assert not keys.opens_session(KEY)
    assert ApiKeys([KEY])._keys != keys._keys  # salted anew in each process


def test_old_sessions_give_way(monkeypatch):
    monkeypatch.setattr("mmrag.server.keys.MAX_SESSIONS", 2)
    keys = ApiKeys([KEY])
    first, second, third = (keys.new_session() for _ in range(3))
    assert [keys.opens_session(each) for each in (first, second, third)] == [False, True, True]


def test_a_foreign_name_or_page_is_refused_on_loopback(client):
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/health", headers={"Host": "localhost:9"}).status_code == 200
    origin = {"Origin": "https://evil.example"}
    assert client.post("/api/search", json=SEARCH, headers=origin).status_code == 403
    own = {"Origin": "http://127.0.0.1:8321"}
    assert client.post("/api/search", json=SEARCH, headers=own).status_code == 200


def test_cors_is_off_unless_asked(client):
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    reply = client.get("/health", headers=asking)
    assert "access-control-allow-origin" not in reply.headers


def test_cors_for_the_origins_that_were_asked_for(make_client):
    client = make_client(cors_origins=("https://app.example",), api_keys=(KEY,))
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    reply = client.options("/api/search", headers=asking)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    headers = {"Origin": "https://app.example", "Authorization": f"Bearer {KEY}"}
    reply = client.post("/api/search", json=SEARCH, headers=headers)
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    asking["Origin"] = "https://evil.example"
    assert client.options("/api/search", headers=asking).status_code == 401


def test_security_headers_are_on_every_answer(client):
    for path in ("/health", "/api/nothing"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_a_long_body_is_refused_by_its_stated_and_by_its_real_length(make_client):
    client = make_client(max_body_bytes=1000)
    body = b'{"query": "' + b"x" * 2000 + b'"}'
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/search", content=body, headers=headers).status_code == 413

    def chunks():
        yield body[:900]
        yield body[900:]

    reply = client.post("/api/search", content=chunks(), headers=headers)
    assert reply.status_code == 413


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "example.org"},
        {"api_keys": ("short",)},
        {"slots": 0},
        {"waiting": -1},
    ],
)
def test_options_that_make_no_sense_or_open_a_door(options):
    with pytest.raises(ConfigError):
        ServerOptions(**options)


def test_who_is_reached_under_which_name():
    assert ServerOptions().hosts >= {"localhost", "127.0.0.1", "::1"}
    assert ServerOptions(host="0.0.0.0", without_keys=True).hosts == frozenset()
    named = ServerOptions(host="0.0.0.0", api_keys=(KEY,), allowed_hosts=("docs.example",))
    assert "docs.example" in named.hosts
    assert [host_name(h) for h in ("[::1]:80", "a:1", "[", "")] == ["::1", "a", "", ""]


def test_the_gate_counts_and_turns_away():
    async def scene():
        gate = Gate(slots=1, waiting=1)
        release = asyncio.Event()

        async def hold():
            async with gate.admit():
                await release.wait()

        first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0)
        assert (gate.running, gate.waiting) == (1, 1)
        with pytest.raises(ApiError) as refused:
            async with gate.admit():
                pass
        assert refused.value.status == 429
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
        second.cancel()  # one that stops waiting leaves its place
        await asyncio.sleep(0)
        assert gate.waiting == 0
        release.set()
        await first
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(scene())
