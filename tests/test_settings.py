"""Settings: sources, their precedence, and errors."""

from __future__ import annotations

import codecs
import json
import os
import re
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, daemon, run_dsmq, without_privileges
from dsmq import environment
from dsmq import settings as config
from dsmq.errors import ConfigError
from dsmq.server import serve

SetEnv = Callable[[str, str], None]
PROPERTIES: dict[str, dict[str, Any]] = config.Settings.model_json_schema()["properties"]
NUMBERS = {
    name: kind
    for name, about in PROPERTIES.items()
    for kind in about.get("anyOf", [about])
    if kind.get("type") in ("integer", "number")
}
FLOATS = [name for name, kind in NUMBERS.items() if kind["type"] == "number"]


@pytest.fixture
def setenv() -> SetEnv:
    return os.environ.__setitem__


def toml(folder: Path, text: str | bytes) -> str:
    file = folder / "dsmq.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def config_error(file: str | None = None, **given: object) -> str:
    """Return the error for these settings, which must be a single line."""
    with pytest.raises(ConfigError) as caught:
        config.load(file, name_of=config.option, **given)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


# Which source wins


def test_defaults_apply_without_any_source() -> None:
    assert config.load().model_dump() == {name: f.default for name, f in config.Settings.model_fields.items()}


def test_toml_wins_over_defaults(tmp_path: Path) -> None:
    settings = config.load(toml(tmp_path, "port = 1001\nallow_shutdown = false"))
    assert (settings.port, settings.allow_shutdown, settings.max_age_seconds) == (1001, False, 600)


def test_environment_wins_over_toml(tmp_path: Path, setenv: SetEnv) -> None:
    setenv("DSMQ_PORT", "1002")
    settings = config.load(toml(tmp_path, "port = 1001\nmax_age_seconds = 7"))
    assert (settings.port, settings.max_age_seconds) == (1002, 7)


def test_command_line_wins_over_environment(setenv: SetEnv) -> None:
    setenv("DSMQ_PORT", "1002")
    setenv("DSMQ_LOG_LEVEL", "error")
    settings = config.load(port="1003")
    assert (settings.port, settings.log_level) == (1003, "error")


def test_dsmq_config_prints_effective_settings(tmp_path: Path) -> None:
    file = toml(tmp_path, "max_age_seconds = 2\nmax_topic_bytes = 2\nlisten_backlog = 2")
    env = {"DSMQ_CONFIG": file, "DSMQ_MAX_TOPIC_BYTES": "3", "DSMQ_LISTEN_BACKLOG": "3"}
    done = run_dsmq("config", "--listen-backlog", "4", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = tomllib.loads(done.stdout.decode())
    names = ("max_connections", "max_age_seconds", "max_topic_bytes", "listen_backlog")
    assert [shown[name] for name in names] == [10_000, 2, 3, 4]


def test_config_option_wins_over_environment(tmp_path: Path, setenv: SetEnv) -> None:
    setenv("DSMQ_CONFIG", str(tmp_path / "missing.toml"))
    assert config.load(toml(tmp_path, "port = 1001")).port == 1001


def test_empty_variable_is_ignored(tmp_path: Path, setenv: SetEnv) -> None:
    setenv("DSMQ_PORT", "")
    setenv("DSMQ_CONFIG", "")
    assert config.load().port == 30008
    assert config.load(toml(tmp_path, "port = 1001")).port == 1001


def test_config_may_be_a_pipe() -> None:
    done = run_dsmq("config", "--config", "/dev/stdin", stdin=b"port = 1001")
    assert tomllib.loads(done.stdout.decode())["port"] == 1001


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load().port = 1


# The embedded server


def test_embedded_server_has_no_http_port_by_default(tmp_path: Path, setenv: SetEnv) -> None:
    def port(file: str | None = None, **given: object) -> int | str:
        return config.load(file, config.EmbeddedSettings, **given).http_port

    assert port() == "off"
    assert port(toml(tmp_path, "port = 1")) == "off"
    assert port(http_port=1001) == 1001
    assert port(toml(tmp_path, "http_port = 1002")) == 1002
    setenv("DSMQ_HTTP_PORT", "1003")
    assert port() == 1003


def test_dsmq_serve_has_http_port_by_default(tmp_path: Path, setenv: SetEnv) -> None:
    assert config.load().http_port == 30009
    assert config.load(toml(tmp_path, 'http_port = "off"')).http_port == "off"
    setenv("DSMQ_HTTP_PORT", "off")
    assert config.load().http_port == "off"


def test_io_threads_zero_chooses_a_number() -> None:
    assert config.load(io_threads=3).io_workers == 3
    assert config.load(io_threads=0).io_workers >= 1


# Invalid settings


# Setting, invalid value, and text that the error must include.
BAD = [
    ("port", "abc", "should be a whole number, not"),
    ("port", "65536", "65535"),
    ("port", "-1", "0"),
    ("port", "1.5", "should be a whole number, not"),
    ("http_port", "on", "should be a whole number or 'off', not"),
    ("max_age_seconds", "0", "greater than 0"),
    ("max_age_seconds", "x", "should be a number, not"),
    ("max_message_bytes", "0", "1"),
    ("io_threads", "65", "64"),
    ("allow_shutdown", "maybe", "should be true or false, not"),
    ("log_level", "loud", "'warning'"),
    *[("host", text, "should be an address") for text in ("[::1", "a b", "http://localhost", "a..b")],
    ("http_host", "::1]", "should be an address"),
    *(
        ("http_allowed_hosts", text, "without ports")
        for text in ("dsmq:30009", "http://dsmq", "*.dsmq", "a b", "dsmq,ö")
    ),
]
by_bad = pytest.mark.parametrize(("name", "value", "expected"), BAD)


@by_bad
def test_invalid_option_is_reported(name: str, value: str, expected: str) -> None:
    line = config_error(**{name: value})
    assert line.startswith("--" + name.replace("_", "-") + ": ")
    assert expected in line
    assert repr(value) in line


@by_bad
def test_invalid_variable_is_reported(name: str, value: str, expected: str, setenv: SetEnv) -> None:
    setenv("DSMQ_" + name.upper(), value)
    line = config_error()
    assert line.startswith("DSMQ_" + name.upper() + ": ")
    assert expected in line
    assert repr(value) in line


@by_bad
def test_invalid_value_in_file_is_reported(name: str, value: str, expected: str, tmp_path: Path) -> None:
    file = toml(tmp_path, f"{name} = {json.dumps(value)}")
    line = config_error(file)
    assert line.startswith(f"{file}: {name}: ")
    assert expected in line
    assert repr(value) in line


@pytest.mark.parametrize(
    "text",
    ["port = 99999", "port = 1.5", "port = []", "[port]\nx = 1", "host = 3", 'host = ""', "port = 2020-01-01"],
)
def test_value_of_wrong_type_is_reported(text: str, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    assert config_error(file).startswith(f"{file}: {'host' if 'host' in text else 'port'}: ")


def test_http_port_false_is_refused(tmp_path: Path) -> None:
    file = toml(tmp_path, "http_port = false")
    assert "http_port" in config_error(file)


def test_all_errors_are_reported_in_one_line() -> None:
    line = config_error(port="abc", log_level="loud", bogus="1")
    assert "--port: " in line
    assert "--log-level: " in line
    assert "bogus: unknown setting" in line


def test_invalid_value_is_blamed_on_file_if_variable_is_empty(tmp_path: Path, setenv: SetEnv) -> None:
    setenv("DSMQ_PORT", "")
    file = toml(tmp_path, "port = 99999")
    assert config_error(file).startswith(f"{file}: port: ")


def test_invalid_variable_is_reported_in_any_case(setenv: SetEnv) -> None:
    setenv("dsmq_port", "abc")
    assert config_error().lower().startswith("dsmq_port: ")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_infinite_seconds_are_refused(name: str, value: str, tmp_path: Path) -> None:
    assert "finite" in config_error(**{name: value})
    assert "finite" in config_error(toml(tmp_path, f"{name} = {value}"))


@pytest.mark.parametrize("name", [name for name, about in PROPERTIES.items() if about.get("type") == "string"])
def test_text_with_nul_character_is_refused(name: str, tmp_path: Path) -> None:
    if not config.is_secret(name):
        assert "NUL" in config_error(**{name: "unix:/a\0b"})
    file = toml(tmp_path, f'{name} = "a\\u0000b"')
    line = config_error(file)
    assert line.startswith(f"{file}: {name}: should be text without NUL characters")
    assert "\0" not in line


@pytest.mark.parametrize("value", ["9" * 5000, 16**5000, "x" * 5000], ids=["digits", "number", "letters"])
@pytest.mark.parametrize("name", ["port", "max_age_seconds", "log_level"])
def test_long_invalid_value_is_shortened(name: str, value: object) -> None:
    assert len(config_error(**{name: value})) < 300


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("prot", "port"),
        ("max_age", "max_age_seconds"),
        ("max_mesage_bytes", "max_message_bytes"),
        ("loglevel", "log_level"),
    ],
)
def test_unknown_setting_error_suggests_nearest(wrong: str, nearest: str, tmp_path: Path, setenv: SetEnv) -> None:
    file = toml(tmp_path, f"{wrong} = 1")
    assert config_error(file) == f"{file}: {wrong}: unknown setting; did you mean {nearest}?"
    setenv("DSMQ_" + wrong.upper(), "1")
    assert config_error() == f"DSMQ_{wrong.upper()}: unknown setting; did you mean DSMQ_{nearest.upper()}?"


def test_section_in_file_is_unknown_setting(tmp_path: Path) -> None:
    file = toml(tmp_path, "[server]\nport = 1")
    assert config_error(file) == f"{file}: server: unknown section; settings are not divided into sections"


def test_names_of_pydantic_arguments_are_unknown_settings(tmp_path: Path) -> None:
    line = config_error(toml(tmp_path, '_env_file = "x"\n_secrets_dir = "y"'))
    assert "_env_file: unknown setting" in line
    assert "_secrets_dir: unknown setting" in line


def test_unknown_setting_without_near_match_has_no_suggestion(tmp_path: Path) -> None:
    file = toml(tmp_path, "frobnicate = 1")
    assert config_error(file) == f"{file}: frobnicate: unknown setting"


def test_call_error_names_arguments_not_options() -> None:
    with pytest.raises(ConfigError, match=r"^port: should be a whole number, not 'x'$"):
        serve("127.0.0.1", "x")  # type: ignore[arg-type]


def test_help_shows_defaults_as_entered() -> None:
    shown = " ".join(run_dsmq("serve", "--help").stdout.decode().split())
    for name, default in [("metrics-topics", "0"), ("protected-mode", "true"), ("idle-timeout-seconds", "0")]:
        assert re.search(rf"--{name} VALUE [^-]*Default: {default} ", shown), name
    assert re.search(r"--tls-cert-file VALUE [^-]*Default: none --", shown)


def test_client_commands_know_all_setting_names() -> None:
    assert list(environment.settings()) == list(config.Settings.model_fields)


def test_unrelated_variables_are_ignored(setenv: SetEnv) -> None:
    setenv("DSMQX_PORT", "abc")
    setenv("PORT", "abc")
    assert config.load().port == 30008


# Service links

LINKS = {
    "DSMQ_PORT": "tcp://10.96.3.7:30008",
    "DSMQ_SERVICE_HOST": "10.96.3.7",
    "DSMQ_SERVICE_PORT": "30008",
    "DSMQ_SERVICE_PORT_DSMQ": "30008",
    "DSMQ_PORT_30008_TCP": "tcp://10.96.3.7:30008",
    "DSMQ_PORT_30008_TCP_ADDR": "10.96.3.7",
    "DSMQ_PORT_30008_TCP_PORT": "30008",
    "DSMQ_PORT_30008_TCP_PROTO": "tcp",
    "DSMQ_HTTP_PORT": "udp://10.96.3.8:30009",
    "DSMQ_METRICS_SERVICE_HOST": "10.96.3.8",
    "DSMQ_METRICS_SERVICE_PORT": "30009",
    "DSMQ_HTTP_PORT_30009_TCP_ADDR": "10.96.3.8",
    "DSMQ_X_PORT": "sctp://10.96.3.9:1",
    "DSMQ_NAME": "/web/dsmq",
    "DSMQ_ENV_PYTHON_VERSION": "3.13",
    "DSMQ_1_NAME": "/web/dsmq_1",
    "DSMQ_1_ENV_PATH": "/bin",
}


@pytest.mark.parametrize("change_case", [str, str.lower])
def test_service_links_are_not_settings(change_case: Callable[[str], str], setenv: SetEnv) -> None:
    for variable, value in LINKS.items():
        setenv(change_case(variable), value)
    assert config.load() == config.Settings()
    assert (config.load().port, config.load().http_port) == (30008, 30009)
    setenv("DSMQ_MAX_TOPICS", "7")
    assert config.load().max_topics == 7


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DSMQ_PORT", "http://10.96.3.7:30008"),
        ("DSMQ_PORT", "30008tcp://"),
        ("DSMQ_PORTS", "tcp://10.96.3.7:30008"),
        ("DSMQ_HOST", "[tcp://10.96.3.7:30008"),
        ("DSMQ_PORT_TCP_ADDR", "10.96.3.7"),
        ("DSMQ_SERVICE_HOSTS", "10.96.3.7"),
        ("DSMQ_SERVICE", "x"),
        ("DSMQ_HOST_NAME", "localhost"),
        ("DSMQ_NAMES", "/web/dsmq"),
        ("DSMQ_ENV", "x"),
    ],
)
def test_variables_resembling_service_links_are_settings(variable: str, value: str, setenv: SetEnv) -> None:
    setenv(variable, value)
    assert config_error().startswith(variable + ": ")


def test_service_links_are_logged_once_at_debug_level() -> None:
    env = {"DSMQ_PORT": "tcp://10.96.3.7:30008", "DSMQ_SERVICE_HOST": "10.96.3.7"}
    # Without an option, the server would listen on the default port, which another server may use.
    with daemon("--port", "0", "--log-level", "debug", env=env) as server:
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_line("configuration reloaded")
        server.stop()
    lines = [line for line in server.log().splitlines() if "DSMQ_SERVICE_HOST" in line]
    assert len(lines) == 1
    assert lines[0].endswith("DEBUG environment variables ignored as service links: DSMQ_PORT, DSMQ_SERVICE_HOST")


def test_contradicting_variables_are_refused(setenv: SetEnv) -> None:
    setenv("DSMQ_PORT", "1001")
    setenv("dsmq_port", "1001")
    assert config.load().port == 1001
    setenv("dsmq_port", "1002")
    assert config_error() == "DSMQ_PORT and dsmq_port are both set, to different values"


def test_config_variable_may_be_lower_case(tmp_path: Path, setenv: SetEnv) -> None:
    setenv("dsmq_config", toml(tmp_path, "port = 1001"))
    assert config.load().port == 1001


# Settings that need others, and secrets

TOKEN = "a-token-that-is-long-enough"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tls_key_file": "key"}, "tls_key_file is set without tls_cert_file"),
        ({"tls_client_ca_file": "ca"}, "tls_client_ca_file is set without tls_cert_file"),
        ({"snapshot_interval_seconds": 5}, "snapshot_interval_seconds is set without snapshot_file"),
        ({"http_token": TOKEN, "http_token_file": "file"}, "http_token and http_token_file are both set"),
        ({"snapshot_file": "it", "snapshot_interval_seconds": "0.99"}, "should be 0, or at least 1, not '0.99'"),
    ],
)
def test_inconsistent_settings_are_refused(given: dict[str, Any], expected: str) -> None:
    assert expected in config_error(**given)


@pytest.mark.parametrize("seconds", [0, 1])
def test_snapshot_interval_is_zero_or_at_least_a_second(seconds: float) -> None:
    assert config.load(snapshot_file="it", snapshot_interval_seconds=seconds).snapshot_interval_seconds == seconds


@pytest.mark.parametrize("name", ["auth_token", "http_token"])
@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (TOKEN + " two", "should be a token: ASCII, without spaces"),
        (" " + TOKEN, "should be a token: ASCII, without spaces"),
        (TOKEN + "ż", "should be a token: ASCII, without spaces"),
        ("*" * 20, "should be the token itself, not its mask"),
        ("x" * 2049, "should have at most 2048 characters"),
    ],
)
def test_invalid_token_error_does_not_show_token(name: str, token: str, expected: str, tmp_path: Path) -> None:
    file = toml(tmp_path, f"{name} = {json.dumps(token)}")
    assert config_error(file) == f"{file}: {name}: {expected}"


@pytest.mark.parametrize("name", ["host", "port", "auth_token", "max_age_seconds", "max_message_bytes", "log_level"])
def test_bytes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: should not be bytes") as told:
        config.load(**{name: b"1234567890123456"})
    assert ("1234567890123456" in str(told.value)) == (name != "auth_token")


def test_secrets_have_no_options_and_are_masked(tmp_path: Path) -> None:
    for name in ("auth_token", "http_token"):
        assert run_dsmq("config", config.option(name), TOKEN).returncode == 2
        settings = config.load(toml(tmp_path, f"{name} = {json.dumps(TOKEN)}"))
        assert getattr(settings, name).get_secret_value() == TOKEN
        assert TOKEN not in config.to_toml(settings)


# The file


def test_missing_config_file_is_reported(tmp_path: Path, setenv: SetEnv) -> None:
    file = str(tmp_path / "missing.toml")
    assert config_error(file) == f"{file}: No such file or directory"
    setenv("DSMQ_CONFIG", file)
    assert config_error() == f"{file}: No such file or directory"


def test_directory_as_config_file_is_reported(tmp_path: Path) -> None:
    assert config_error(str(tmp_path)) == f"{tmp_path}: Is a directory"


def test_unreadable_config_file_is_reported(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1")
    os.chmod(file, 0)
    done = run_dsmq("config", "--config", file, prefix=without_privileges())
    assert (done.returncode, done.stdout, done.stderr.decode()) == (2, b"", f"dsmq: {file}: Permission denied\n")


@pytest.mark.parametrize(
    "text",
    [
        b"port = ",
        b"port: 5\n",
        b"port = 1\nport = 2\n",
        b"host = '\xff'",
        b"\xff\xfep\x00o\x00r\x00t\x00",
        b"port = " + b"9" * 5000,
        b"max_age_seconds = " + b"9" * 5000,
        b"port = 0x" + b"f" * 5000,
        b"#" * 2_000_000,
        b"host = " + b"[" * 5000 + b"]" * 5000,
    ],
    ids=[
        "no value",
        "YAML",
        "twice",
        "not UTF-8",
        "UTF-16",
        "long number",
        "long seconds",
        "long hexadecimal",
        "endless",
        "deep",
    ],
)
def test_invalid_toml_is_reported(text: bytes, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    line = config_error(file)
    assert line.startswith(f"{file}: ")
    assert len(line) < 300
    assert "sys." not in line


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_config_file_is_recognised(encoding: str, tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1001".encode(encoding))
    assert config_error(file) == f"{file}: should be UTF-8; this looks like UTF-16"


def test_config_file_may_begin_with_byte_order_mark(tmp_path: Path) -> None:
    assert config.load(toml(tmp_path, codecs.BOM_UTF8 + b"port = 1001\r\n")).port == 1001


def test_endless_config_file_is_refused() -> None:
    assert config_error("/dev/zero") == "/dev/zero: longer than 1048576 bytes"


def test_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    assert config.load(toml(tmp_path, "")).model_dump() == config.load().model_dump()


# Properties of every setting


@pytest.mark.parametrize("name", config.Settings.model_fields)
def test_every_setting_has_a_description(name: str) -> None:
    about = environment.settings()[name]
    assert about[0].isupper()
    assert about.endswith(".")


def test_every_numeric_setting_has_bounds() -> None:
    assert len(NUMBERS) > 10
    for name, kind in NUMBERS.items():
        assert {"minimum", "exclusiveMinimum"} & set(kind), name
        assert "maximum" in kind, name


@pytest.mark.parametrize("name", NUMBERS)
def test_out_of_bounds_numbers_are_refused(name: str) -> None:
    kind = NUMBERS[name]
    needed = {"snapshot_file": "it"} if name == "snapshot_interval_seconds" else {}
    assert getattr(config.load(**{name: kind["maximum"]}, **needed), name) == kind["maximum"]
    config_error(**{name: kind["maximum"] + 1})
    if "minimum" in kind:
        assert getattr(config.load(**{name: kind["minimum"]}), name) == kind["minimum"]
        config_error(**{name: kind["minimum"] - 1})
    else:
        config_error(**{name: kind["exclusiveMinimum"]})


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2_000_000_000), ("64 MiB", 67_108_864), ("1.5kb", 1500), ("100", 100), ("100B", 100), ("1tib", 2**40)],
)
def test_sizes_have_units_in_every_source(text: str, size: int, tmp_path: Path, setenv: SetEnv) -> None:
    assert config.load(max_stored_bytes=text).max_stored_bytes == size
    assert config.load(toml(tmp_path, f"max_stored_bytes = '{text}'")).max_stored_bytes == size
    setenv("DSMQ_MAX_STORED_BYTES", text)
    assert config.load().max_stored_bytes == size


@pytest.mark.parametrize("name", [name for name in config.Settings.model_fields if "_bytes" in name])
def test_every_setting_in_bytes_accepts_units(name: str) -> None:
    size = "4KB" if name == "max_topic_bytes" else "16KiB"
    assert getattr(config.load(**{name: size}), name) == (4000 if name == "max_topic_bytes" else 16384)


@pytest.mark.parametrize("text", ["2G", "GB", "-1GB", "1e9B", "2GB2", "2 G B", "2iB", "many"])
def test_text_that_is_not_a_size_is_refused(text: str) -> None:
    about = f"should be a number of bytes, or a size such as 2GB or 512MiB, not {text!r}"
    assert config_error(max_stored_bytes=text) == f"--max-stored-bytes: {about}"


@pytest.mark.parametrize("text", ["1.0001kB", "9999TB", "-1", ""])
def test_invalid_size_is_refused(text: str) -> None:
    assert "--max-stored-bytes: should be" in config_error(max_stored_bytes=text)


# Rules for topics


def test_rules_keep_their_order(tmp_path: Path) -> None:
    first, second = config.load(toml(tmp_path, TOPICS)).topic
    assert first.model_dump() == {
        "pattern": "camera/*",
        "max_messages": 30,
        "max_bytes": 1_572_864,
        "max_age_seconds": 5.0,
        "when_full": "drop_oldest",
    }
    assert second.model_dump(exclude_none=True) == {"pattern": "ö"}


@pytest.mark.parametrize("rules", ["", "[[topic]]\npattern = 'a'\n"])
def test_rules_can_be_appended_to_printed_settings(rules: str, tmp_path: Path) -> None:
    printed = config.to_toml(config.load(toml(tmp_path, rules)))
    more = config.load(toml(tmp_path, f"{printed}\n[[topic]]\npattern = 'b'\n"))
    assert [rule.pattern for rule in more.topic] == [*(["a"] if rules else []), "b"]


def test_variable_for_topics_is_refused(setenv: SetEnv) -> None:
    setenv("DSMQ_TOPIC", "camera")
    assert "DSMQ_TOPIC: rules for topics are [[topic]] tables in a file" in config_error()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_messages = 3", "topic 1: pattern: is missing"),
        ("pattern = 'a'\nmax_topics = 3", "topic 1: max_topics: this setting is for all topics; put it above"),
        ("pattern = 'a'\n[[topic]]\npattern = 'b'\nmax = 1", "topic 2: max: unknown; the settings in [[topic]] are p"),
        ("pattern = ''", "topic 1: pattern: should have 1 to 4096 bytes, not ''"),
        ("pattern = 3", "topic 1: pattern: should be text, not 3"),
        ("pattern = 'a'\nmax_messages = 0", "topic 1: max_messages: should be greater than or equal to 1, not 0"),
        ("pattern = 'a'\nmax_messages = true", "topic 1: max_messages: should not be true or false"),
        (
            "pattern = 'a'\nmax_bytes = '1 XB'",
            "topic 1: max_bytes: should be a number of bytes, or a size such as 2GB or 512MiB, not '1 XB'",
        ),
        ("pattern = 'a'\nwhen_full = 'drop'", "topic 1: when_full: should be 'refuse' or 'drop_oldest', not 'drop'"),
    ],
)
def test_invalid_rule_is_reported(text: str, expected: str, tmp_path: Path) -> None:
    assert f"dsmq.toml: {expected}" in config_error(toml(tmp_path, f"[[topic]]\n{text}"))


@pytest.mark.parametrize("text", ["[topic]\npattern = 'a'", "topic = 3", "topic = 'a'", "topic = ['a']"])
def test_rules_must_be_tables(text: str, tmp_path: Path) -> None:
    assert "topic" in (error := config_error(toml(tmp_path, text)))
    assert "should be written as tables: [[topic]]" in error


# TOML out


def test_example_file_matches_settings() -> None:
    assert (ROOT / "dsmq.toml.example").read_text() == config.example()


def test_dsmq_config_example_prints_example_file() -> None:
    done = run_dsmq("config", "--example")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, config.example(), b"")


def test_example_names_every_setting_with_default(tmp_path: Path) -> None:
    lines = config.example().splitlines()
    uncommented = "\n".join(line[1:] for line in lines if line[:1] == "#" and line[1:2] not in ("", " "))
    assert list(tomllib.loads(uncommented)) == list(config.Settings.model_fields)
    assert config.load(toml(tmp_path, uncommented)).model_dump() == config.load().model_dump()


def test_unchanged_example_changes_nothing(tmp_path: Path) -> None:
    assert config.load(toml(tmp_path, config.example())).model_dump() == config.load().model_dump()


# A non-default value for every setting; the host has characters that TOML escapes.
TOPICS = """
[[topic]]
pattern = "camera/*"
max_messages = 30
max_bytes = "1.5 MiB"
max_age_seconds = 5
when_full = "drop_oldest"

[[topic]]
pattern = "ö"
"""
OTHERS: dict[str, Any] = {
    "topic": tomllib.loads(TOPICS)["topic"],
    "when_full": "drop_oldest",
    "host": 'unix:/tmp/"ö\\ 😀',
    "http_host": "::1",
    "http_port": "off",
    "allow_shutdown": False,
    "log_level": "debug",
    "log_format": "json",
    "log_stream": "stdout",
    "protected_mode": False,
    "http_allowed_hosts": "dsmq, mq.example.org",
    **{
        name: f"/etc/dsmq/{name}"
        for name in config.Settings.model_fields
        if name.endswith("_file") and not name.startswith("store_")
    },
    **{name: kind["maximum"] for name, kind in NUMBERS.items() if name != "http_port"},
}
# Settings for a store shared by several servers, which exclude snapshots. A token would exclude user and password.
SHARED_STORE: dict[str, Any] = {
    "store": "tls://nats-1:4222,[::1]:4223",
    "store_stream": "others",
    "store_replicas": 5,
    "store_user": "dsmq",
    "store_password_file": "/etc/dsmq/password",
    "store_ca_file": "/etc/dsmq/ca.pem",
    "store_token_file": "",
    "snapshot_file": "",
    "snapshot_interval_seconds": 0.0,
    "when_full": "refuse",
}


@pytest.mark.parametrize(
    "given",
    [OTHERS, {name: OTHERS[name] for name in OTHERS if name != "topic"} | SHARED_STORE],
    ids=["all", "shared store"],
)
def test_dsmq_config_output_loads_back_unchanged(given: dict[str, Any], tmp_path: Path) -> None:
    settings = config.load(**given)
    shown = {name: f for name, f in config.Settings.model_fields.items() if not config.is_secret(name)}
    same = {name for name, f in shown.items() if getattr(settings, name) == f.default}
    assert same <= {name for name in SHARED_STORE if given.get(name) in (None, "", 0.0)} | {"topic", "when_full"}
    options = [word for name, value in given.items() for word in (config.option(name), str(value)) if name != "topic"]
    file = toml(tmp_path, TOPICS) if "topic" in given else toml(tmp_path, "")
    done = run_dsmq("config", "--config", file, *options)
    assert (done.returncode, done.stderr) == (0, b"")
    assert config.load(toml(tmp_path, done.stdout)).model_dump() == settings.model_dump()
