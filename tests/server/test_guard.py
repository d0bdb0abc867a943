"""Who may ask, from where, and how much: no state changes for anyone else, and nothing large is ever taken in."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from serving import START, Serve, Server, until

from sfumato.cli import main

TOKEN = "a-token-for-tests-0123456789"
APP, PUBLIC = "https://app.example.org", "https://pictures.example.org"
JSON = {"content-type": "application/json"}
WORDS = b'{"prompt": "a red apple", "steps": 1}'


def raw(server: Server, data: bytes, seconds: float = 20) -> bytes:
    """Send bytes as they are, and return what comes back."""
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname or "", at.port or 0), timeout=seconds) as s:
        s.sendall(data)
        seen = b""
        while part := s.recv(65536):
            seen += part
        return seen


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def test_an_address_that_others_reach_needs_a_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        assert main(["serve", "--host", host, "--folder", str(tmp_path)]) == 2
        assert "set a token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port must be"),
        (["--batch", "0"], "batch must be"),
        (["--max-queue", "0"], "queue must be"),
        (["--token-file", "missing"], "cannot be read"),
        (["--token-file", "short"], "printable ASCII"),
        (["--database", "nonsense"], "URL cannot be used"),
        (["--model", "missing"], "no model"),
        (["--folder", "short"], "cannot use the folder"),
        (["--token", "x"], "unrecognized"),
        (["--allow-origin", "*"], "--allow-origin must be an address"),
        (["--public-url", "https://example.org/a?b"], "--public-url must be an address"),
        (["--public-url", "https://example.org/../a"], "--public-url must be an address"),
        (["--public-url", "https://example.org/jobs/"], "may not begin with /jobs"),
    ],
)
def test_a_server_that_cannot_be_started_says_why(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("abc")
    port = [] if "--port" in flags else ["--port", "0"]
    assert main(["serve", *port, *flags]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("sfumato: ")
    assert message in err


def test_a_token_of_the_environment_is_as_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for token in ("x", "ä" * 20):
        monkeypatch.setenv("SFUMATO_TOKEN", token)
        assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--folder", str(tmp_path)]) == 2
        assert "SFUMATO_TOKEN must hold one token of 16" in capsys.readouterr().err


def test_with_a_token_every_route_but_liveness_and_readiness_gives_401(serve: Serve) -> None:
    server = serve(
        "sfumato.families:load", "--allow-origin", APP, "--public-url", f"{PUBLIC}/art/", ready=False, token=TOKEN
    )
    bare = httpx.Client(base_url=server.url)
    routes: dict[str, Any] = server.http.get("/openapi.json").json()["paths"]
    assert {"/jobs", "/metrics", "/pictures/{id}.png", "/v1/images/generations", "/sdapi/v1/txt2img"} <= routes.keys()
    for path, methods in [
        *routes.items(),
        ("/openapi.json", ["get"]),
        ("/", ["get"]),
        ("/static/x", ["get"]),
        ("/none", ["get"]),
    ]:
        for method in methods:
            if path in ("/livez", "/readyz"):
                assert bare.request(method, path).status_code != 401
                continue
            for wrong in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {TOKEN}"},
                {"Authorization": TOKEN},
            ):
                answer = bare.request(method, path.replace("{id}", "x"), headers=wrong)
                assert answer.status_code == 401, (method, path)
                assert "Basic" in answer.headers["www-authenticate"]
                assert TOKEN not in answer.text
    assert httpx.get(f"{server.url}/limits", auth=("anyone", TOKEN)).status_code == 200
    assert httpx.get(f"{server.url}/limits", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    _other_pages(server, bare)
    bare.close()
    assert TOKEN not in server.log.read_text()
    assert TOKEN not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


def _other_pages(server: Server, bare: httpx.Client) -> None:
    """Pages of an allowed origin, and who comes through a proxy."""
    until(lambda: bare.get("/readyz").status_code == 200, START)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in ((APP, True), ("https://evil.com", False), ("null", False)):
        before = bare.options("/jobs", headers={"Origin": origin, **asked})
        here = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        without = bare.post("/jobs", headers=here, json={"prompt": "a", "steps": 1})
        sent = server.http.post("/jobs", headers=here, json={"prompt": "a", "steps": 1})
        assert (before.status_code, without.status_code, sent.status_code) == (
            (200, 401, 202) if allowed else (400, 401, 403)
        )
        for answer in (before, without, sent):
            assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
            assert "access-control-allow-credentials" not in answer.headers
    through = {"Host": PUBLIC.removeprefix("https://"), "Origin": PUBLIC}
    made = server.http.post("/v1/images/generations", headers=through, json={"prompt": "a", "steps": 1}).json()
    assert made["data"][0]["url"].startswith(f"{PUBLIC}/art/pictures/")
    _below_a_path(server, bare)


def _below_a_path(server: Server, bare: httpx.Client) -> None:
    """``--public-url`` with a path: routes are there with it, and without it for a proxy that leaves it out."""
    for prefix in ("", "/art"):
        assert bare.get(f"{prefix}/livez").status_code == 200
        assert bare.get(f"{prefix}/jobs").status_code == 401
        said = server.http.post(f"{prefix}/jobs", json={"prompt": "a", "steps": 1})
        id = said.json()["id"]
        assert said.headers["location"] == f"/art/jobs/{id}"
        (picture,) = server.ended(id)["pictures"]
        assert picture["url"] == f"/art/pictures/{id}-0.png"
        assert server.http.get(picture["url"]).headers["content-type"] == "image/png"
        entry = server.http.get(f"{prefix}/pictures/{id}-0").json()
        assert entry["url"] == picture["url"]
        assert server.http.post(f"{prefix}/v1/images/generations", json={}).json()["error"]["type"]
        assert server.http.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/art"}]
        large = {"image": "A" * (2 << 20)}
        assert server.http.post(f"{prefix}/sdapi/v1/png-info", json=large).status_code == 422
        assert server.http.post(f"{prefix}/jobs", json=large).status_code == 413
    assert server.http.get("/art").headers["location"] == "/art/"
    assert 'src="static/' in server.http.get("/art/").text
    for strange in ("/artful/livez", "/art/art/livez", "/art//livez"):
        assert server.http.get(strange).status_code == 404


HOSTS = ["localhost", "127.0.0.1", "[::1]"]
STRANGERS = [
    "localhost.evil.com",
    "evil.com",
    "127.0.0.1.evil.com",
    "10.0.0.1",
    "[::2]",
    "localhost@evil.com",
    "",
    "[",
    "local host",
]


def test_no_stranger_changes_anything(shared: Server) -> None:
    """The matrix of Host, Origin, content type and method."""
    port = urlsplit(shared.url).port
    job = shared.submit(steps=1)
    shared.ended(job["id"])
    before = (shared.metrics()["sfumato_jobs_accepted_total"], shared.http.get("/pictures").json()["total"])
    picture = f"/pictures/{job['id']}-0"

    def ask(method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> int:
        head = "".join(f"{k}: {v}\r\n" for k, v in headers)
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        return status(
            raw(shared, f"{method} {path} HTTP/1.1\r\n{head}{length}Connection: close\r\n\r\n".encode() + body)
        )

    for host in STRANGERS:
        for method, path in (("POST", "/jobs"), ("DELETE", picture), ("GET", "/jobs")):
            assert ask(method, path, [("Host", host), ("Content-Type", "application/json")], WORDS) in (400, 421), host
    assert ask("POST", "/jobs", [("Content-Type", "application/json")], WORDS) == 400  # no Host at all
    assert (
        ask("POST", "/jobs", [("Host", "localhost"), ("Host", "evil.com"), ("Content-Type", "application/json")], WORDS)
        == 400
    )
    here = ("Host", f"localhost:{port}")
    for origin in (
        "null",
        "https://evil.com",
        "http://localhost.evil.com",
        "http://localhost",
        f"ftp://localhost:{port}",
        "http://[",
        "",
    ):
        for method, path in (("POST", "/jobs"), ("DELETE", picture), ("POST", "/sdapi/v1/interrupt")):
            assert ask(method, path, [here, ("Origin", origin), ("Content-Type", "application/json")], WORDS) == 403, (
                origin
            )
    for site in ("cross-site", "same-site"):
        assert ask("DELETE", picture, [here, ("Sec-Fetch-Site", site)]) == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonp", "text/json"):
        for path in ("/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/uploads"):
            assert ask("POST", path, [here, ("Content-Type", kind)], WORDS) == 415, (kind, path)
    for method in ("PUT", "PATCH", "TRACE", "CONNECT", "FOO"):
        assert ask(method, "/jobs", [here, ("Content-Type", "application/json")], WORDS) in (400, 404, 405), method

    after = (shared.metrics()["sfumato_jobs_accepted_total"], shared.http.get("/pictures").json()["total"])
    assert after == before
    for host in HOSTS:  # and the friends of the house still can
        assert ask("GET", "/limits", [("Host", host)]) == 200
    assert (
        ask(
            "POST", "/jobs", [here, ("Origin", f"http://localhost:{port}"), ("Content-Type", "application/json")], WORDS
        )
        == 202
    )


def test_headers_of_every_answer(shared: Server) -> None:
    for path in ("/", "/jobs", "/none", "/openapi.json", "/metrics"):
        headers = shared.http.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers
    assert shared.http.get("/jobs", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert shared.http.get("/jobs", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def nested(depth: int) -> bytes:
    return b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"


LIMITS: list[tuple[str, bytes, int]] = [
    ("a long body", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413),
    ("deep", nested(33), 400),
    ("deeper than Python reads", nested(100_000), 400),
    ("no object", b"[1]", 422),
    ("no JSON", b"{prompt: 1}", 400),
    ("no text", b"\xff\xfe", 400),
    ("NaN", b'{"prompt": "a", "guidance": NaN}', 400),
    ("a long number", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
    ("an endless number", b'{"prompt": "a", "guidance": 1e999}', 422),
    ("a lone surrogate", b'{"prompt": "\\ud800"}', 422),
    ("NUL", b'{"prompt": "a\\u0000"}', 422),
    ("no prompt", b"{}", 422),
    ("too many pixels", b'{"prompt": "a", "width": 1000000, "height": 1000000}', 422),
    ("too many steps", b'{"prompt": "a", "steps": 201}', 422),
    ("too many pictures", b'{"prompt": "a", "n": 33}', 422),
    ("a type", b'{"prompt": "a", "steps": "3"}', 422),
    ("true is no number", b'{"prompt": "a", "steps": true}', 422),
    ("a field given twice", b'{"prompt": "a", "prompt": "b"}', 422),
    ("an unknown field", b'{"prompt": "a", "stepz": 3}', 422),
    ("an unknown model", b'{"prompt": "a", "model": "../../etc/passwd"}', 422),
    ("a model of a type", b'{"prompt": "a", "model": {"a": 1}}', 422),
]


@pytest.mark.parametrize(("what", "body", "expected"), LIMITS, ids=[c[0] for c in LIMITS])
@pytest.mark.parametrize("path", ["/jobs", "/v1/images/generations"])
def test_limits(shared: Server, path: str, what: str, body: bytes, expected: int) -> None:
    if path != "/jobs" and expected == 422 and "too many" not in what:  # which OpenAI's clients know as others
        expected = 404 if what == "an unknown model" else 400
    before = shared.metrics()["sfumato_jobs_accepted_total"]
    answer = shared.http.post(path, content=body, headers=JSON)
    assert answer.status_code == expected, answer.text
    error = answer.json()["error"]
    assert len(error["message"]) < 500
    assert error["code"] == "bad_request" or path != "/jobs"
    assert "aaaaaaaa" not in answer.text, "a prompt in an error"
    assert shared.metrics()["sfumato_jobs_accepted_total"] == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/jobs?stat=done", "unknown parameter 'stat'; did you mean 'state'?"),
        ("/pictures?search=cat", "unknown parameter 'search'"),
        ("/jobs?limit=1&limit=2", "limit is given more than once"),
        ("/jobs?before=none", "before: there is no such job"),
        ("/pictures?before=none", "before: there is no such picture"),
    ],
)
def test_what_a_query_asks_is_never_ignored(shared: Server, path: str, message: str) -> None:
    answer = shared.http.get(path)
    assert answer.status_code == 422
    assert message in answer.json()["error"]["message"]


def test_what_an_address_takes_is_told(shared: Server) -> None:
    answer = shared.http.put("/livez", json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
    assert answer.json()["error"]["message"] == "this address takes only GET"
    answer = shared.http.put("/jobs", json={})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    assert shared.http.delete("/sdapi/v1/options").headers["allow"] == "GET, POST"
    answer = shared.http.post("/jobs", content=WORDS, headers={**JSON, "content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "bad_request")


def test_the_product_of_pixels_steps_and_n_is_bounded(serve: Serve) -> None:
    server = serve("sfumato.families:load", "--max-work", "2000", "--max-pixels", "512")
    post = server.http.post
    assert post("/jobs", json={"prompt": "a", "steps": 7, "n": 1}).status_code == 202
    assert "× n × best_of is" in post("/jobs", json={"prompt": "a", "steps": 4, "n": 2}).json()["error"]["message"]
    assert "height is 1024" in post("/jobs", json={"prompt": "a", "width": 32, "height": 32}).json()["error"]["message"]


def test_what_is_announced_too_large_is_not_read(shared: Server) -> None:
    """Headers alone decide: no byte of the body is sent."""
    for path, kind, size in (
        ("/jobs", "application/json", 1 << 40),
        ("/uploads", "image/png", (32 << 20) + 1),
        ("/sdapi/v1/img2img", "application/json", 50 << 20),
        ("/v1/images/edits", "multipart/form-data; boundary=x", 33 << 20),
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n"
        assert status(raw(shared, head.encode())) == 413
    chunks = b"".join(b"10000\r\n" + b"a" * 65536 + b"\r\n" for _ in range(20)) + b"0\r\n\r\n"
    head = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    assert status(raw(shared, head + chunks)) == 413
    long = b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"
    for strange in (long, b"no HTTP at all\r\n\r\n"):
        answer = raw(shared, strange)
        assert status(answer) in (400, 431)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"


def test_no_place_of_this_machine_in_an_answer(shared: Server) -> None:
    for path in (
        "/models",
        "/jobs",
        "/pictures",
        "/sdapi/v1/sd-models",
        "/v1/models",
        "/readyz",
        "/none",
        "/jobs/none",
    ):
        text = shared.http.get(path).text
        assert str(shared.folder) not in text
        assert "/tmp" not in text
        assert "Traceback" not in text
    for path in (
        "/pictures/..%2f..%2fetc%2fpasswd",
        "/pictures/%2e%2e/queue.db",
        "/static/../server/app.py",
        "/uploads/..%2fqueue.png",
    ):
        assert shared.http.get(path).status_code in (404, 401)


def test_logs_are_lines_of_json_without_words(shared: Server) -> None:
    secret = "xylophone-of-the-seventh-moon"
    job = shared.submit(secret, steps=1)
    shared.ended(job["id"])
    shared.http.get("/pictures", params={"q": secret})
    shared.http.get(f"/{secret}")
    shared.http.post("/jobs", json={"prompt": secret, "steps": 0})
    shared.http.post("/v1/images/generations", json={"prompt": "a", secret: 3})
    lines = shared.log.read_text().splitlines()
    assert all({"time", "level", "message", "request_id"} <= json.loads(line).keys() for line in lines)
    assert not any(secret in line for line in lines)
    assert secret not in shared.http.get("/metrics").text


def test_metrics_do_not_grow_with_prompts(shared: Server, soak: bool) -> None:
    def series() -> int:
        return len(shared.metrics())

    shared.ended(shared.submit("first", steps=1)["id"])
    shared.http.get("/x0")
    before = series()
    for i in range(1000 if soak else 10):
        job = shared.submit(f"prompt {i}", seed=i, steps=1)
        shared.http.get(f"/x{i}")
        shared.http.get(f"/jobs/{i}")
    shared.ended(job["id"])
    assert series() <= before + 4  # statuses of known routes that had not been seen
    shared.check_sum()
