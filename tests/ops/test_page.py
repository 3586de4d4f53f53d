"""The status page of a real server, in a headless Chromium."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import trustme

from conftest import HOST, ROOT, SOON, serving, tool, wire_to
from dsmq import __version__
from dsmq import settings as config
from dsmq.client import DSMQClientSideConnection as Client
from dsmq.client import connect
from dsmq.errors import Full
from dsmq.server import Server
from dsmq.wire.resp import encode_request
from engine import engine

pytestmark = pytest.mark.browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Response

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

HOSTILE = "<img src=x onerror=\"document.title='broken'\">"
TOKEN = "open-sesame-0123456789"
# A host name that resolves to this machine in the browser.
ELSEWHERE = "dsmq.example"
# The browser's console messages if the server is gone or the page is reloaded, and if it requires a token.
GONE = r"Failed to load resource: net::ERR_|^failed: .*/(status|topics?)\.json(\?.*)?$"
LOCKED = r"Failed to load resource: .* 401 "


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = tool("chromium", "chromium")
    expect.set_options(timeout=SOON * 1000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"]
        )
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(http_port=0) as server:
        yield server


@pytest.fixture
def mq(server: Server) -> Iterator[Client]:
    with connect(port=server.port, retry=False) as mq:
        yield mq


@contextmanager
def reading(
    browser: Browser, server: Server, allowed: str = "nothing", host: str = "127.0.0.1", **options: Any
) -> Iterator[Page]:
    """Open the page of this server; at the end, fail on browser messages that don't match the pattern `allowed`."""
    context = browser.new_context(locale="en-US", **options)
    context.set_default_timeout(SOON * 1000)
    page = context.new_page()
    base = f"http://{host}:{server.http_port}/"
    troubles: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"exception: {error}"))
    page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(base)
        yield page
        assert [trouble for trouble in troubles if not re.search(allowed, trouble)] == []
        routes = {base, *(f"{base}{name}.json" for name in ("status", "topics", "topic"))}
        assert {url.partition("?")[0] for url in asked if not url.startswith("data:")} <= routes
    finally:
        context.close()


@contextmanager
def repeating(call: Callable[[], object]) -> Iterator[None]:
    """Call repeatedly, in another thread."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.01):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(SOON)


def sideways(page: Page) -> int:
    """Return how many pixels the page can be scrolled sideways."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def names(page: Page) -> list[str]:
    """Return the topics in the order shown."""
    return page.locator("#topics tbody td:first-child").all_inner_texts()


def next_poll(page: Page) -> Response:
    with page.expect_response("**/status.json") as answer:
        pass
    return answer.value


# Security


def test_page_is_one_file_that_passes_strict_policy() -> None:
    html = (ROOT / "src" / "dsmq" / "ops" / "page.html").read_text()
    for element in ("script", "style"):
        assert len(re.findall(rf"<{element}\b", html)) == len(re.findall(f"<{element}>", html)) == 1
    markup = re.sub("<(script|style)>.*?</\\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style|srcset)\s*=", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", html)
    # No URL but the namespace of SVG.
    assert {urlsplit(url).netloc for url in re.findall(r"https?://[^'\"\s)]*", html)} == {"www.w3.org"}


def test_page_policy_blocks_everything_else(browser: Browser, server: Server) -> None:
    with reading(browser, server, "Content Security Policy") as page:
        expect(page.locator("#main")).to_be_visible()
        violated = page.evaluate(
            """new Promise((resolve) => {
                const all = new Set();
                document.addEventListener("securitypolicyviolation", (event) => {
                    all.add(event.effectiveDirective);
                    if (all.size === 3) resolve([...all].sort());
                });
                fetch("http://127.0.0.2:9/").catch(() => {});
                document.body.setAttribute("onclick", "document.title = 'run'");
                document.body.setAttribute("style", "color: red");
            })"""
        )
        assert violated == ["connect-src", "script-src-attr", "style-src-attr"]


# Numbers


def test_page_shows_ready_server(browser: Browser, server: Server) -> None:
    with reading(browser, server) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#state")).to_have_class("ok")
        expect(page.locator("#reasons")).to_be_empty()
        expect(page.locator("#about")).to_have_text(re.compile(rf"^up\s\d+\ss · version {re.escape(__version__)}$"))
        expect(page).to_have_title("dsmq")
        expect(page.locator("#connecting")).to_be_hidden()
        expect(page.locator("#banner")).to_be_hidden()


def test_page_numbers_update_with_traffic(browser: Browser, server: Server, mq: Client) -> None:
    def put_and_get() -> None:
        mq.put("greetings", "x" * 1000)
        mq.get("greetings")

    with reading(browser, server) as page:
        expect(page.locator("#puts")).to_have_text("0/s")
        expect(page.locator("#sent_bytes")).to_have_text("0 B/s")
        with repeating(put_and_get):
            for name in ("puts", "deliveries"):
                expect(page.locator(f"#{name}")).to_have_text(re.compile(r"^[1-9][\d,.]*/s$"))
            for name in ("received_bytes", "sent_bytes"):
                expect(page.locator(f"#{name}")).to_have_text(re.compile(r"^[1-9][\d,.]*\s[KM]iB/s$"))
            expect(page.locator("#topics tbody td").nth(3)).to_have_text(re.compile(r"^[1-9][\d,.]*/s$"))
            for plot in ("#messages-plot", "#bytes-plot"):
                expect(page.locator(plot)).to_have_attribute(
                    "aria-label", re.compile("at most [1-9].* in, [1-9].* out")
                )
                expect(page.locator(f"{plot} path.in")).to_have_attribute("d", re.compile(r"^M[\d.]+ [\d.]+L"))
        expect(page.locator("#puts")).to_have_text("0/s")
        count = f"{server.status.totals().stored:,}"
        expect(page.locator("#stored-messages")).to_have_text(count)
        # The bytes of topics add up to the total.
        status = server.status.page()
        assert status["topics"][0]["bytes"] + 500 + len("greetings") == status["gauges"]["stored_bytes"]
        expect(page.locator("#total-puts")).to_have_text(count)
        expect(page.locator("#total-deliveries")).to_have_text(count)
        expect(page.locator("#topics tbody td").nth(1)).to_have_text(count)


def test_page_shows_how_many_messages_each_topic_has_dropped(browser: Browser) -> None:
    settings = {"http_port": 0, "max_stored_messages_per_topic": 2, "when_full": "drop_oldest"}
    with serving(**settings) as server, connect(port=server.port) as mq, reading(browser, server) as page:
        mq.put_many("t", ["x"] * 5)
        mq.put("u", "x")
        expect(page.locator("#topics tbody tr")).to_have_count(2)
        page.get_by_role("button", name="Dropped").click()
        assert names(page) == ["t", "u"]
        expect(page.locator("#topics tbody td:last-child")).to_have_text(["3", "0"])
        page.locator("#topics").get_by_role("link", name="t", exact=True).click()
        expect(page.locator("#topic-facts")).to_contain_text("Dropped3")


def test_page_lists_clients_and_what_they_read(browser: Browser, server: Server) -> None:
    with reading(browser, server) as page:
        expect(page.locator("#clients-card .none")).to_be_visible()
        with wire_to(server) as wire:
            wire.call("CLIENT", "SETNAME", "indexer")
            for _ in range(3):
                wire.call("PUT", "t", "x")
            wire.call("GET", "t")
            cells = page.locator("#clients tbody td")
            expect(cells.nth(0)).to_have_text(re.compile(r"^indexer 127\.0\.0\.1:\d+$"))
            expect(cells.nth(1)).to_have_text("t")
            expect(cells.nth(2)).to_have_text("t")
            expect(cells.nth(3)).to_have_text("2")
            expect(page.locator("#open")).to_have_text("1")
        expect(page.locator("#clients tbody tr")).to_have_count(0)
        expect(page.locator("#open")).to_have_text("0")


def test_page_lists_and_counts_errors(browser: Browser, server: Server) -> None:
    with reading(browser, server) as page, wire_to(server) as wire:
        expect(page.locator("#total-errors")).to_have_text("0")
        wire.error("FROBNICATE")
        expect(page.locator("#errors tbody td").nth(1)).to_have_text("UNKNOWN")
        expect(page.locator("#errors tbody td").nth(2)).to_have_text(re.compile(r"127\.0\.0\.1:\d+"))
        expect(page.locator("#total-errors")).to_have_text("1 +1 recently")


# Names and messages


def test_page_escapes_hostile_names(browser: Browser, server: Server) -> None:
    with reading(browser, server) as page, wire_to(server) as wire:
        wire.call("CLIENT", "SETNAME", HOSTILE.replace(" ", "/"))
        wire.call("PUT", HOSTILE, "x")
        expect(page.locator("#topics tbody td").first).to_have_text(HOSTILE)
        expect(page.locator("#clients tbody td").first).to_contain_text(HOSTILE.replace(" ", "/"))
        expect(page.locator("img")).to_have_count(0)
        expect(page).to_have_title("dsmq")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\u202eb\u061c\nc\u2028", r"a\u202eb\u061c\u000ac\u2028"),
        ("\u200b\ufeff\u00ad", r"\u200b\ufeff\u00ad"),
        ("\N{HEAVY BLACK HEART}\ufe0f\u200d", "\N{HEAVY BLACK HEART}\ufe0f\u200d"),
    ],
    ids=["control and bidi", "invisible", "emoji"],
)
def test_page_escapes_characters_that_hide_or_reorder_text(
    name: str, shown: str, browser: Browser, mq: Client, server: Server
) -> None:
    mq.put(name, "x")
    with reading(browser, server) as page:
        expect(page.locator("#topics tbody td").first).to_have_text(shown)


def test_page_never_shows_messages(browser: Browser, mq: Client, server: Server) -> None:
    mq.put("t", "the quick brown fox")
    with reading(browser, server) as page:
        expect(page.locator("#stored-messages")).to_have_text("1")
        assert "brown" not in page.content()
        assert "brown" not in next_poll(page).text()


# Topics


def test_page_filter_finds_any_topic(browser: Browser, server: Server) -> None:
    names_ = [b"sensors/%06d" % n for n in range(100_000)] + [b"alarms/door"]
    for start in range(0, len(names_), 1000):
        server.context.store.append([(name, b"x", None) for name in names_[start : start + 1000]])
    server.context.store.append([(b"sensors/000001", b"x", None)])
    with reading(browser, server) as page:
        expect(page.locator("#topics-shown")).to_have_text("the 100 largest of 100,001")
        field = page.get_by_label("Filter all topics")
        field.fill("door")
        expect(page.locator("#topics tbody tr")).to_have_count(1)
        assert names(page) == ["alarms/door"]
        expect(page.locator("#pages")).to_be_hidden()
        field.fill("sensors/*7")
        expect(page.locator("#topics-shown")).to_have_text("100 of 10,000")
        expect(page.locator("#topics tbody td").first).to_have_text("sensors/000007")
        page.get_by_role("button", name="Next 100").click()
        expect(page.locator("#topics tbody td").first).to_have_text("sensors/001007")
        page.get_by_role("button", name="First").click()
        expect(page.locator("#topics tbody td").first).to_have_text("sensors/000007")
        field.fill("nothing")
        expect(page.locator("#topics-card .none")).to_have_text("No topic matches.")
        field.fill("")
        expect(page.locator("#topics-shown")).to_have_text("the 100 largest of 100,001")
        assert names(page)[0] == "sensors/000001"


def test_page_shows_last_messages_of_topic_as_they_arrive(browser: Browser, mq: Client, server: Server) -> None:
    mq.put_many("t", [f"text {n}" for n in range(30)])
    with reading(browser, server, GONE) as page:
        link = page.locator("#topics").get_by_role("link", name="t", exact=True)
        link.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#topic-name")).to_have_text("t")
        expect(page.locator("#topic-name")).to_be_focused()
        expect(page).to_have_title(re.compile("^t . dsmq$"))
        expect(page.locator("#overview")).to_be_hidden()
        expect(page.locator("#messages li")).to_have_count(20)
        assert page.locator("#messages pre").all_inner_texts() == [f"text {n}" for n in range(29, 9, -1)]
        page.locator("#messages pre").first.evaluate("(body) => body.id = 'kept'")
        mq.put("t", "<b>news</b>")
        expect(page.locator("#messages pre").first).to_have_text("<b>news</b>")
        # The element stays the same, so that its text can be selected.
        expect(page.locator("#messages pre").nth(1)).to_have_id("kept")
        expect(page.locator("#messages li")).to_have_count(20)
        expect(page.locator("#messages .note").first).to_have_text(
            re.compile(r"^#31 · id 31 · \d+\ss ago · text, 11 bytes$")
        )
        expect(page.locator("#topic-facts")).to_contain_text("31")
        with repeating(lambda: mq.put("t", "x")):
            expect(page.locator("#topic-facts dd").nth(2)).to_have_text(re.compile(r"^[1-9][\d,.]*/s$"))
        page.get_by_role("link", name="All topics").click()
        expect(page.locator("#overview")).to_be_visible()
        expect(page.locator("#topic")).to_be_hidden()
        expect(link).to_be_focused()
        expect(page).to_have_title("dsmq")
        page.go_back()
        expect(page.locator("#topic-name")).to_have_text("t")
        page.reload()
        expect(page.locator("#topic-name")).to_have_text("t")


@pytest.mark.parametrize(
    ("body", "kind", "shown"),
    [
        (HOSTILE.encode(), "text, ", HOSTILE),
        ("a\u202eb\r\x1b[2J\n\tc".encode(), "text, ", "a\\u202eb\\u000d\\u001b[2J\n\tc"),
        (b"\xff<b>\x7f", "binary, ", f"0000  ff 3c 62 3e 7f{'':35}.<b>."),
        (b"\0", "binary, ", f"0000  00{'':47}."),
        (b"", "text, ", ""),
        (
            b'{"id":12345678901234567890,"a":[],"b":[1.10,{}],"a":"\\u00b0\\u202e<i>"}',
            "JSON, ",
            '{\n  "id": 12345678901234567890,\n  "a": [],\n  "b": [\n    1.10,\n    {}\n  ],\n  "a": "°\\u202e<i>"\n}',
        ),
        (b"[" * 2000 + b"]" * 2000, "JSON, ", None),
        (b'{"open": ', "text, ", '{"open": '),
        ("€".encode() * 2_796_202, "text, the first 4 KiB of ", "€" * 1365),
        (b"\xfe" * 8_388_608, "binary, the first 4 KiB of ", None),
    ],
    ids=["HTML", "control", "invalid", "NUL", "empty", "JSON", "deep", "no JSON", "long text", "long binary"],
)
def test_page_shows_any_body(browser: Browser, server: Server, body: bytes, kind: str, shown: str | None) -> None:
    server.context.store.append([(b"t", body, None), (b"t", b"next", None)])
    with reading(browser, server, viewport={"width": 360, "height": 800}) as page:
        page.get_by_role("link", name="t", exact=True).click()
        expect(page.locator("#messages li")).to_have_count(2)
        about = page.locator("#messages .note").last.inner_text().replace("\u202f", " ").replace("\xa0", " ")
        assert re.fullmatch(rf"#1 · id 1 · \d+ s ago · {kind}{len(body):,} bytes", about)
        if shown is not None:
            assert page.locator("#messages pre").last.text_content() == shown
        expect(page.locator("img")).to_have_count(0)
        expect(page).to_have_title(re.compile("^t . dsmq$"))
        assert sideways(page) == 0


@pytest.mark.parametrize(
    "name", [HOSTILE, "a\u202eb\n\0c", "#topic=%00&name=x?+ %zz", "😀\u2028", "t" * 500, "__proto__"]
)
def test_page_shows_topic_with_any_name(browser: Browser, mq: Client, server: Server, name: str) -> None:
    mq.put(name, "the body")
    with reading(browser, server, viewport={"width": 360, "height": 800}) as page:
        page.get_by_label("Filter all topics").fill(name[:2])
        page.locator("#topics tbody a").click()
        expect(page.locator("#messages pre")).to_have_text("the body")
        escaped = re.sub("[\0\n\u202e\u2028]", lambda match: f"\\u{ord(match[0]):04x}", name)
        assert page.locator("#topic-name").text_content() == escaped
        expect(page.locator("img")).to_have_count(0)
        assert sideways(page) == 0
        # An address that no link contains.
        page.evaluate("location.hash = '#topic=%ff'")
        expect(page.locator("#overview")).to_be_visible()


def test_page_shows_readers_and_writers_of_topic(browser: Browser, server: Server) -> None:
    with (
        connect(port=server.port, name="camera") as writer,
        connect(port=server.port, name="slow") as slow,
        connect(port=server.port, name="<i>all") as fast,
        reading(browser, server) as page,
    ):
        writer.put_many("cam/1", ["a", "b", "c"])
        assert slow.get("cam/1") == "a"
        assert len(fast.read("cam/*", n=10)) == 3
        page.get_by_role("link", name="cam/1").first.click()
        expect(page.locator("#writers tbody tr")).to_have_count(1)
        expect(page.locator("#writers tbody td").first).to_have_text(re.compile(r"^camera 127\.0\.0\.1:\d+$"))
        rows = page.locator("#readers tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0).locator("td").nth(0)).to_contain_text("slow")
        expect(rows.nth(1).locator("td").nth(0)).to_contain_text("<i>all")
        expect(rows.nth(1).locator("td").nth(1)).to_have_text("cam/*")
        expect(rows.nth(1).locator("td").nth(3)).to_have_text("0")


def test_page_shows_groups_of_workers_and_their_jobs(browser: Browser, server: Server) -> None:
    group = HOSTILE.replace(" ", "/")
    with (
        wire_to(server) as wire,
        wire_to(server) as other,
        wire_to(server) as idle,
        reading(browser, server, viewport={"width": 390, "height": 800}) as page,
    ):
        wire.call("CLIENT", "SETNAME", HOSTILE.replace(" ", "/"))
        for body in "abc":
            wire.call("PUT", "jobs", body)
        page.get_by_role("link", name="jobs", exact=True).first.click()
        expect(page.locator("#messages li")).to_have_count(3)
        expect(page.locator("#groups-card")).to_be_hidden()
        expect(page.locator("#jobs-card")).to_be_hidden()
        wire.call("TAKE", "jobs", "workers", "60000", "COUNT", "2")
        wire.call("DONE", "jobs", "workers", "1", "1")
        wire.call("RETURN", "jobs", "workers", "2", "1")
        other.call("TAKE", "jobs", "workers", "60000")
        wire.call("TAKE", "job*", group, "60000", "COUNT", "3")
        wire.call("TAKE", "other", "elsewhere", "60000")
        idle.send(encode_request(b"TAKE", b"job*", group.encode(), b"60000", b"WAIT", b"60000"))
        rows = page.locator("#groups tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(1).locator("td").last).to_have_text("1")
        assert rows.nth(0).locator("td").all_text_contents()[:8] == ["workers", "jobs", "1", "1", "0", "1", "0", "0"]
        assert rows.nth(1).locator("td").all_text_contents()[:8] == [group, "job*", "0", "3", "0", "0", "0", "0"]
        jobs = page.locator("#jobs tbody tr")
        expect(jobs).to_have_count(4)
        expect(jobs.nth(0).locator("td").nth(4)).to_have_text(re.compile(r"^\d+\u202fs$"))
        assert jobs.nth(0).locator("td").all_text_contents()[1:4] == ["workers", "2", "2"]
        assert jobs.nth(1).locator("td").all_text_contents()[1:4] == [group, "1", "1"]
        expect(jobs.nth(1).locator("td").first).to_contain_text("<img")
        assert sideways(page) == 0
        expect(page.locator("img")).to_have_count(0)
        expect(page).to_have_title(re.compile("^jobs "))


def test_page_shows_messages_only_with_http_token(browser: Browser) -> None:
    secret = "the quick brown fox"
    with (
        serving(http_port=0, auth_token=TOKEN) as server,
        connect(port=server.port, token=TOKEN) as mq,
        reading(browser, server) as page,
    ):
        mq.put("t", secret)
        page.get_by_role("link", name="t", exact=True).first.click()
        expect(page.locator("#messages-locked")).to_be_visible()
        expect(page.locator("#topic-facts dd").first).to_have_text("1")
        expect(page.locator("#messages li")).to_have_count(0)
        assert secret not in page.content()
    with (
        serving(http_port=0, auth_token=TOKEN, http_token=TOKEN) as server,
        connect(port=server.port, token=TOKEN) as mq,
        reading(browser, server, LOCKED) as page,
    ):
        mq.put("t", secret)
        page.evaluate("location.hash = '#topic=t'")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_label("Token").press("Enter")
        expect(page.locator("#messages pre")).to_have_text(secret)
        expect(page.locator("#messages-locked")).to_be_hidden()


def test_page_shows_address_and_settings(browser: Browser) -> None:
    with serving(http_port=0, auth_token=TOKEN, max_topic_bytes=77) as server, reading(browser, server) as page:
        facts = page.locator("#server")
        expect(facts).to_contain_text(f"127.0.0.1:{server.port}")
        expect(facts).to_contain_text(re.compile(r"Memory[\d.]+\sMiB"))
        expect(facts).to_contain_text("token required, no TLS")
        expect(facts).to_contain_text("max_topic_bytes77")
        expect(facts).to_contain_text("auth_token**********")
        assert TOKEN not in page.content()


# States


def test_empty_page_shows_how_to_put_a_message(browser: Browser, mq: Client, server: Server) -> None:
    with reading(browser, server) as page:
        expect(page.locator("#empty")).to_contain_text("No messages yet")
        expect(page.locator("#how-to-put")).to_have_text(re.compile(r"^dsmq put( --port \d+)? greetings hello$"))
        expect(page.locator("#topics-card")).to_be_hidden()
        mq.put("greetings", "hello")
        expect(page.locator("#empty")).to_be_hidden()
        expect(page.locator("#topics-card")).to_be_visible()
        assert names(page) == ["greetings"]


@pytest.mark.parametrize(
    ("settings", "options", "given"),
    [
        ({"host": "0.0.0.0", "protected_mode": "off"}, "--host dsmq.example --port N", '"dsmq.example", port=N'),
        ({"host": "127.0.0.1"}, "--port N", "port=N"),
        ({"host": "unix:{}/it's here"}, "--host 'unix:{}/it'\\''s here'", '"unix:{}/it\'s here"'),
        ({"auth_token": TOKEN}, "--port N --token-file token", 'port=N, token="…"'),
        ({"tls_cert_file": "{}/cert.pem"}, "--port N --tls", "port=N, tls=True"),
    ],
    ids=["all addresses", "loopback", "unix", "token", "TLS"],
)
def test_page_commands_match_the_server(
    browser: Browser, tmp_path: Path, settings: dict[str, str], options: str, given: str
) -> None:
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    fitted = {name: value.format(tmp_path) for name, value in settings.items()}
    fitted["http_allowed_hosts"] = ELSEWHERE
    with serving(http_port=0, **fitted) as server, reading(browser, server, host=ELSEWHERE) as page:
        options, given = (
            text.replace("N", str(server.status.port)).replace("{}", str(tmp_path)) for text in (options, given)
        )
        expect(page.locator("#how-to-read")).to_have_text(f"dsmq get {options} greetings --follow")
        expect(page.locator("#how-to-put")).to_have_text(f"dsmq put {options} greetings hello")
        expect(page.locator("#how-to-python")).to_contain_text(f'connect({given}).put("greetings", "hello")')
        expect(page.locator("#how-to-token")).to_be_visible(visible="auth_token" in settings)
        expect(page.locator("#how-to-tls")).to_be_visible(visible="tls_cert_file" in settings)
        assert TOKEN not in page.content()


def test_page_highlights_full_server(browser: Browser) -> None:
    with (
        serving(http_port=0, max_stored_messages=20) as server,
        connect(port=server.port, retry=False) as mq,
        reading(browser, server) as page,
    ):
        for stored, note, kind in [(15, "75% of 20", "bar"), (16, "Filling: 80% of 20", "bar warn")]:
            mq.put_many("t", ["x"] * (stored - server.status.totals().messages))
            expect(page.locator("#stored-messages-note")).to_have_text(note)
            expect(page.locator("#stored-messages-bar")).to_have_class(re.compile(f"^{kind} ?$"))
        expect(page.locator("#state")).to_have_text("Ready")
        mq.put_many("t", ["x"] * 4)
        with pytest.raises(Full):
            mq.put("t", "x")
        expect(page.locator("#state")).to_have_text("Full")
        expect(page.locator("#state")).to_have_class("bad")
        expect(page.locator("#reasons")).to_contain_text("Puts are refused until messages expire")
        expect(page).to_have_title(re.compile("^Full .* dsmq$"))
        expect(page.locator("#stored-messages-note")).to_have_text("Full: 100% of 20")
        expect(page.get_by_role("meter", name="Stored messages")).to_have_attribute("aria-valuenow", "20")
        expect(page.locator("#total-puts_refused")).to_have_text("1 +1 recently")


def test_page_shows_engine_only_if_there_is_one(browser: Browser, server: Server, tmp_path: Path) -> None:
    with reading(browser, server) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#engine")).to_be_hidden()
    with engine(tmp_path, 1) as nodes:
        [node] = nodes.nodes
        given = {"port": 0, "http_port": 0, "store": f"nats://{HOST}:{node.port}", "store_replicas": 1}
        with (
            Server(config.load(kind=config.EmbeddedSettings, **given)) as other,
            reading(browser, other) as page,
        ):
            line = page.locator("#engine")
            expect(line).to_have_text(f"NATS stream dsmq · connected to {node.name} · mirror up to date")
            expect(line).to_have_class("card ")
            node.kill()
            expect(line).to_have_text(re.compile(r"^NATS stream dsmq · not connected · mirror \d+\ss behind$"))
            expect(line).to_have_class("card bad")
            expect(page.locator("#state")).to_have_text("Not ready")
            expect(page.locator("#reasons")).to_contain_text("no connection to the engine: ")
            node.start()
            expect(line).to_have_text(f"NATS stream dsmq · connected to {node.name} · mirror up to date")
            expect(page.locator("#state")).to_have_text("Ready")


def test_page_reports_lost_server_and_recovers(browser: Browser) -> None:
    with serving(http_port=0) as server, reading(browser, server, GONE) as page:
        port = server.http_port
        with connect(port=server.port) as mq:
            mq.put("t", "x")
        expect(page.locator("#stored-messages")).to_have_text("1")
        server.stop()
        expect(page.locator("#problem")).to_have_text("No response from the server.")
        expect(page.locator("#since")).to_have_text(re.compile(r"^Last update \d+\ss ago\.$"))
        expect(page.locator("#state")).to_have_text("No response")
        expect(page.locator("#main")).to_have_class("stale")
        expect(page.locator("#stored-messages")).to_have_text("1")
        with serving(http_port=port):
            expect(page.locator("#banner")).to_be_hidden()
            expect(page.locator("#main")).not_to_have_class("stale")
            expect(page.locator("#state")).to_have_text("Ready")
            expect(page.locator("#stored-messages")).to_have_text("0")
            expect(page.locator("#puts")).to_have_text("0/s")


def test_page_keeps_token_for_the_tab_only(browser: Browser) -> None:
    with serving(http_port=0, http_token=TOKEN) as server, reading(browser, server, f"{LOCKED}|{GONE}") as page:
        field = page.get_by_label("Token")
        expect(page.get_by_role("heading", name="Token required")).to_be_visible()
        expect(page.locator("#main")).to_be_hidden()
        expect(field).to_be_focused()
        for wrong in ("wrong", "not äscii"):
            field.fill(wrong)
            field.press("Enter")
            expect(page.locator("#ask-why")).to_contain_text("Invalid token.")
            expect(page.locator("#ask-why")).to_contain_text("http_token_file")
            expect(field).to_have_value("")
            assert not page.evaluate("sessionStorage.getItem('token')")
        field.fill(TOKEN)
        field.press("Enter")
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#ask")).to_be_hidden()
        assert next_poll(page).request.headers["authorization"] == f"Bearer {TOKEN}"
        assert TOKEN not in page.content()
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        page.reload()
        expect(page.locator("#state")).to_have_text("Ready")
        other = page.context.new_page()
        other.goto(page.url)
        expect(other.locator("#state")).to_have_text("Locked")
        # An invalid token is forgotten.
        page.evaluate("sessionStorage.setItem('token', 'wrong')")
        page.reload()
        expect(page.locator("#state")).to_have_text("Locked")
        assert not page.evaluate("sessionStorage.getItem('token')")


def test_page_works_without_storage(browser: Browser) -> None:
    with serving(http_port=0, http_token=TOKEN) as server, reading(browser, server, f"{LOCKED}|{GONE}") as page:
        page.add_init_script("Object.defineProperty(window, 'sessionStorage', { get() { throw new Error(); } })")
        page.reload()
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_label("Token").press("Enter")
        expect(page.locator("#state")).to_have_text("Ready")


def test_page_does_not_poll_while_hidden_or_paused(browser: Browser, server: Server) -> None:
    with reading(browser, server) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        page.evaluate(
            """() => {
                let hidden = false;
                Object.defineProperty(document, "hidden", { get: () => hidden });
                window.hide = (now) => { hidden = now; document.dispatchEvent(new Event("visibilitychange")); };
                window.asked = 0;
                const ask = fetch;
                window.fetch = (...all) => { asked++; return ask(...all); };
                // The timer calls tick(), which sends no request during another.
                window.asksNow = async (first = () => {}) => {
                    while (asking) await new Promise((resume) => setTimeout(resume, 1));
                    asked = 0;
                    first();
                    tick();
                    return asked;
                };
            }"""
        )
        assert page.evaluate("asksNow()") == 1
        assert page.evaluate("asksNow(() => hide(true))") == 0
        page.evaluate("hide(false)")
        next_poll(page)
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#state")).to_have_text("Paused")
        assert page.evaluate("asksNow()") == 0
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#state")).to_have_text("Ready")
        assert page.evaluate("asked") > 0


# Use


def test_page_sorts_topics_by_keyboard(browser: Browser, mq: Client, server: Server) -> None:
    for topic, count, size in [("a", 1, 500), ("b", 3, 10), ("c", 2, 100)]:
        mq.put_many(topic, ["x" * size] * count)
    with reading(browser, server) as page:
        headers = page.locator("#topics th")
        expect(page.locator("#topics tbody tr")).to_have_count(3)
        assert names(page) == ["b", "c", "a"]
        expect(headers.nth(1)).to_have_attribute("aria-sort", "descending")
        button = page.get_by_role("button", name="Topic")
        button.focus()
        for order, direction in [(["a", "b", "c"], "ascending"), (["c", "b", "a"], "descending")]:
            page.keyboard.press("Enter")
            assert names(page) == order
            expect(headers.nth(0)).to_have_attribute("aria-sort", direction)
            expect(page.locator("#topics th[aria-sort]")).to_have_count(1)
        # Updates keep the focus and the order.
        mq.put("d", "x")
        expect(page.locator("#topics tbody tr")).to_have_count(4)
        assert names(page) == ["d", "c", "b", "a"]
        expect(button).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert names(page) == ["a", "c", "b", "d"]
        expect(headers.nth(2)).to_have_attribute("aria-sort", "descending")


@pytest.mark.parametrize("width", [320, 360, 390, 768, 1280])
def test_page_fits_screen_width(browser: Browser, server: Server, width: int) -> None:
    with wire_to(server) as wire, reading(browser, server, viewport={"width": width, "height": 800}) as page:
        expect(page.locator("#empty")).to_be_visible()
        assert sideways(page) == 0
        wire.call("CLIENT", "SETNAME", "n" * 60)
        wire.call("PUT", "t" * 500, "x")
        wire.error("FROBNICATE" * 20)
        for table in ("topics", "clients", "errors"):
            expect(page.locator(f"#{table} tbody tr")).to_have_count(1)
            cells = page.locator(f"#{table} tbody td")
            for cell in cells.all():
                box = cell.bounding_box()
                assert box
                assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert sideways(page) == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_page_aligns_numbers_and_commands(browser: Browser, server: Server, width: int) -> None:
    with reading(browser, server, viewport={"width": width, "height": 800}) as page:
        expect(page.locator("#how-to-put")).to_be_visible()
        height = "(pre) => (pre.clientHeight - 20) / parseFloat(getComputedStyle(pre).lineHeight)"
        assert round(page.locator("#how-to-put").evaluate(height)) == 1
        rows: dict[float, set[float]] = {}
        for group in page.locator("#totals > div").all():
            top, number = group.bounding_box(), group.locator("dd").bounding_box()
            assert top
            assert number
            rows.setdefault(top["y"], set()).add(number["y"])
        assert rows
        assert all(len(heights) == 1 for heights in rows.values())


def test_page_follows_dark_mode_preference(browser: Browser, server: Server) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        with reading(browser, server, color_scheme=scheme) as page:
            expect(page.locator("#main")).to_be_visible()
            for name in ("background-color", "color"):
                color = page.locator("body").evaluate(f"(body) => getComputedStyle(body).getPropertyValue('{name}')")
                brightness[scheme, name] = sum(map(int, re.findall(r"\d+", color)[:3])) / 3
    assert brightness["light", "background-color"] - brightness["light", "color"] > 150
    assert brightness["dark", "color"] - brightness["dark", "background-color"] > 150


def test_page_follows_reduced_motion_preference(browser: Browser, server: Server) -> None:
    for wish, moves in (("no-preference", True), ("reduce", False)):
        with reading(browser, server, reduced_motion=wish) as page:
            bar = page.locator("#stored-messages-bar div")
            took = bar.evaluate("(bar) => parseFloat(getComputedStyle(bar).transitionDuration)")
            assert (took > 0) is moves
