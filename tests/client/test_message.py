"""Message objects: their text, JSON and metadata."""

from __future__ import annotations

import copy
import pickle

import pytest

from dsmq.client.message import Message
from dsmq.errors import MessageNotText

MESSAGE = Message("sensors/1", 7, 2, 1700000000.5, '{"°C": 21.5}'.encode())
BINARY = MESSAGE._replace(body=b"a\xffb\xe2\x82")


def test_str_is_the_text() -> None:
    assert str(MESSAGE) == MESSAGE.text == '{"°C": 21.5}'
    assert f"{MESSAGE._replace(body=b'on'):>5}" == "   on"


def test_bytes_that_are_not_utf8_are_escaped_in_str_and_refused_as_text() -> None:
    assert str(BINARY) == r"a\xffb\xe2\x82"
    with pytest.raises(MessageNotText, match="'sensors/1'"):
        _ = BINARY.text


def test_json_returns_the_value() -> None:
    assert MESSAGE.json() == {"°C": 21.5}
    for body in (b"", b"{", b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011 - JSONDecodeError or UnicodeDecodeError
            MESSAGE._replace(body=body).json()


def test_message_is_a_tuple_of_its_fields_that_can_be_pickled_and_copied() -> None:
    topic, message_id, number, put_at, body = MESSAGE
    assert (topic, message_id, number, put_at, body) == MESSAGE
    assert pickle.loads(pickle.dumps(MESSAGE)) == copy.copy(MESSAGE) == MESSAGE
    assert repr(MESSAGE).startswith("Message(topic='sensors/1', id=7, number=2, put_at=")
