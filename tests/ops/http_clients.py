"""Shared by the tests of the HTTP endpoint."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing

import pytest

from conftest import SOON, serving
from dsmq.server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(http_port=0) as server:
        yield server


class Answer:
    """The reply to one request to the HTTP endpoint."""

    def __init__(
        self, port: int | None, path: str, method: str = "GET", host: str = "127.0.0.1", **headers: str
    ) -> None:
        assert port
        with closing(http.client.HTTPConnection(host, port, timeout=SOON)) as connection:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            self.status = response.status
            self.headers = response.headers
            self.type = response.headers["Content-Type"]
            self.body = response.read()
            self.text = self.body.decode()
