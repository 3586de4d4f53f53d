"""The settings as arguments of `serve` and `Server`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import SecretStr

from dsmq import connect
from dsmq.errors import ConfigError
from dsmq.options import ServeOptions, ServerOptions
from dsmq.server import Server, serve
from dsmq.settings import EmbeddedSettings, Settings


def spelled(kind: Any) -> set[Any]:
    """Return the types that a setting accepts, without bounds; secrets are text."""
    if get_origin(kind) is Annotated:
        return spelled(get_args(kind)[0])
    if get_args(kind) and get_origin(kind) is not Literal:
        return set().union(*map(spelled, get_args(kind)))
    return {str if kind is SecretStr else kind}


def test_options_are_the_settings_with_their_types() -> None:
    fields = Settings.model_fields
    assert list(get_type_hints(ServeOptions)) == [name for name in fields if name not in ("host", "port")]
    options = get_type_hints(ServerOptions)
    # Tables in the file are dictionaries here.
    assert options.pop("topic")
    kinds = {name: spelled(field.annotation) for name, field in fields.items() if name != "topic"}
    assert {name: spelled(kind) for name, kind in options.items()} == kinds


@pytest.mark.parametrize("call", [serve, Server])
def test_signature_lists_every_setting_with_its_default(call: Callable[..., Any]) -> None:
    parameters = inspect.signature(call).parameters
    assert all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for name, value in {**EmbeddedSettings().model_dump(mode="json"), "topic": ()}.items():
        assert parameters[name].default == value, name


def test_server_accepts_options() -> None:
    with Server(port=0, max_age_seconds=5) as server, connect(port=server.port) as mq:
        mq.put("t", "x")
        assert mq.get("t") == "x"
        assert server.context.settings.max_age_seconds == 5
    with pytest.raises(ConfigError, match="max_age_second: unknown setting; did you mean max_age_seconds"):
        Server(max_age_second=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="not both"):
        Server(EmbeddedSettings(), port=0)
