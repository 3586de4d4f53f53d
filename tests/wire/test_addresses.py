"""Addresses of servers."""

from __future__ import annotations

import pytest

from dsmq.wire.addresses import Endpoint, host_names, parse_endpoint


@pytest.mark.parametrize(
    ("text", "endpoint", "shown"),
    [
        ("127.0.0.1", Endpoint("127.0.0.1", 7), "127.0.0.1:7"),
        ("name.example", Endpoint("name.example", 7), "name.example:7"),
        ("a-1_é.example.", Endpoint("a-1_é.example.", 7), "a-1_é.example.:7"),
        ("fe80::1%eth0", Endpoint("fe80::1%eth0", 7), "[fe80::1%eth0]:7"),
        ("::1", Endpoint("::1", 7), "[::1]:7"),
        ("[::1]", Endpoint("::1", 7), "[::1]:7"),
        ("unix:/run/dsmq", Endpoint("", 7, "/run/dsmq"), "unix:/run/dsmq"),
        ("unix:[x", Endpoint("", 7, "[x"), "unix:[x"),
    ],
)
def test_endpoint_is_parsed_and_formatted(text: str, endpoint: Endpoint, shown: str) -> None:
    assert parse_endpoint(text, 7) == endpoint
    assert str(endpoint) == shown


URLS = ["http://localhost", "redis://localhost", "localhost/", "user@host"]
NOT_HOSTS = ["a b", "a\n", "a\x7f", "a,b", "a..b", "a" * 64, "\ud800", *URLS]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[", "]", "[::1", "::1]", "unix:", "127.0.0.1:1", "a:", ":1", "[::1]:1", *NOT_HOSTS],
    ids=ascii,
)
def test_invalid_endpoint_raises(text: str) -> None:
    with pytest.raises(ValueError, match="should be an address"):
        parse_endpoint(text)


def test_host_names_are_normalised() -> None:
    assert host_names(" A.example., b ,") == {"a.example", "b"}
    for text in ("a:80", "a b", "-", "a.example/"):
        with pytest.raises(ValueError, match="without ports"):
            host_names(text)
