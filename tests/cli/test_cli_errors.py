"""How commands find the server, and the one-line errors that they print."""

from __future__ import annotations

import codecs
import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from commands import address, assert_one_line, ended, mq, result, server, started, topic
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from conftest import SOON, Daemon, daemon, run_dsmq, without_privileges
from dsmq.__main__ import main
from dsmq.client import DSMQClientSideConnection
from dsmq.settings import SUBJECTS
from helpers import refusing_address

# Fixtures.
__all__ = ["address", "mq", "server", "topic"]

# The server's address


def test_host_and_port_come_from_the_environment(server: Daemon) -> None:
    env = {"DSMQ_HOST": "localhost", "DSMQ_PORT": str(server.port)}
    assert result("ping", env=env)[1].startswith(b"PONG from localhost:%d " % server.port)


def test_host_may_include_port(server: Daemon) -> None:
    host = f"127.0.0.1:{server.port}"
    assert result("ping", "--host", host, "--port", str(server.port))[0] == 0
    assert result("ping", "--host", host, env={"DSMQ_PORT": "1"})[0] == 0
    assert result("ping", "-H", host)[0] == 0
    assert result("ping", "-H", "127.0.0.1", "-p", str(server.port), env={"DSMQ_PORT": "1"})[0] == 0
    assert_one_line(result("ping", "--host", "[::1]:1"), 1, "no server answers at [::1]:1")


def test_options_win_over_environment(server: Daemon) -> None:
    env = {"DSMQ_HOST": "nowhere.invalid", "DSMQ_PORT": "1"}
    assert result("ping", "--host", "127.0.0.1", "--port", str(server.port), env=env)[0] == 0


def test_empty_variables_are_ignored(server: Daemon) -> None:
    assert result("ping", "--port", str(server.port), env={"DSMQ_HOST": "", "DSMQ_PORT": ""})[0] == 0


def test_unix_socket_is_removed_on_stop(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    host = f"unix:{path}"
    with started("serve", "--host", host, "--http-port", "off") as server:
        assert server.stderr is not None
        assert f"listening on {host} ".encode() in server.stderr.readline()
        assert result("put", "t", "hello", "--host", host) == (0, b"", b"")
        assert result("get", "t", "--after", "0", env={"DSMQ_HOST": host}) == (0, b"hello\n", b"")
        server.terminate()
        assert ended(server)[0] == 0
    assert not path.exists()


# Errors are one line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("frobnicate", "frobnicate"),
        ("get", "TOPIC"),
        ("put t x y", "y"),
        ("get t --frobnicate", "--frobnicate"),
        ("get t -n 0", "-n"),
        ("get t --after -1", "--after"),
        ("get t --after 9223372036854775808", "--after"),
        ("get t -f", "unknown argument '-f'"),
        ("get t u -f", "unknown argument '-f'"),
        ("get t --since 5x", "'5x' is not a time such as 30s, 5m or 2h"),
        ("get t --since -5", "--since"),
        ("get t --since 1e3", "--since"),
        ("get t --last 0", "--last"),
        ("get t --last 2 --after 0", "--after: not allowed with argument --last"),
        ("get t --last 2 --since 5", "--since: not allowed with argument --last"),
        ("get t --format %q", "'%q' has an unknown sequence %q; use %t "),
        ("get t --format 1%", "'1%' has an unknown sequence %"),
        ("get t --format \\x", "has an unknown sequence \\x; use \\t "),
        ("get t --format %p --json", "not allowed with argument"),
        ("get t -v --output f", "not allowed with argument"),
        ("get t --output f -n 2", "--output writes one message"),
        ("get t --output f --follow", "--output writes one message"),
        ("get t --output=", "--output: the name of the file is empty"),
        ("get t --output=new/", "--output: 'new/' is a directory"),
        ("put t* x", "'t*' is a pattern, because it contains *; dsmq put takes one topic"),
        ("put t x --file f", "MESSAGE and --file are mutually exclusive"),
        ("put t --file=", "--file: the name of the file is empty"),
        ("stats t u", "quote a topic with spaces: dsmq stats 't u'"),
        ("stats t*", "'t*' is a pattern"),
        ("stop now", "'now'"),
        ("completion tcsh", "SHELL must be one of bash, zsh, fish, not 'tcsh'"),
        ("completion", "SHELL"),
        ("watch --interval 0", "--interval: '0' is not a number of seconds from 0.001 to 86400"),
        ("watch --interval 1e7", "--interval: '1e7' is not"),
        ("watch --interval inf", "--interval: 'inf' is not"),
        ("ping -p 0", "--port: '0' is not a port number"),
        ("ping -p 3_0", "--port: '3_0' is not a port number"),
        ("ping -p ٣٠", "--port: '٣٠' is not a port number"),
        ("get t -n 1_0", "'1_0' is not a whole number"),
        ("get t --wait 1_0", "--wait: '1_0' is not a number of seconds"),
        ("get t --after 1_0", "--after: '1_0' is not an id"),
        (
            "put t --hello",
            "did you mean --help?; to begin a message with --, write -- before it",
        ),
        ("put t --prot 1", "did you mean --port?"),
        ("--port 1 put t x", "'--port' must follow the command: dsmq put --port ..."),
        ("--verison", "unknown argument '--verison'; did you mean --version?"),
        ("serv", "unknown command 'serv'; did you mean serve?"),
        ("stats t -- --json", "unknown argument '--json'; after --, there are no options"),
        ("put", "TOPIC"),
        ("topics t", "'t'"),
        ("topics -t", "'-t'"),
        ("-t", "'-t'"),
        ("get t --wait nan", "--wait"),
        ("put t x --reconnect nan", "--reconnect"),
        ("ping --timeout nan", "--timeout"),
        ("ping --timeout 0", "--timeout"),
        ("bench -n 0", "-n"),
        ("bench -n inf", "-n"),
        ("get t --after nan", "--after"),
        ("get t --after 1:", "--after"),
        ("get t --after :1", "--after"),
        ("get t --after e:1:2", "--after"),
        ("get t --after e:" + "9" * 20, "--after"),
        ("get t --after " + "9" * 5000, "--after"),
        ("ping --port " + "9" * 5000, "--port"),
        ("serve --port " + "9" * 5000, "--port"),
        ("put t x --prot=" + "9" * 5000, "--prot"),
        ("ping --port=", "--port"),
        ("ping --host=", "--host: '' is not an address"),
        ("ping --host unix:", "'unix:' is not an address"),
        ("ping --token-file=", "--token-file: the name of the file is empty"),
        ("ping --ca-file=", "--ca-file: the name of the file is empty"),
        ("ping --cert-file=", "--cert-file: the name of the file is empty"),
        ("ping --cert-file /nowhere --key-file=", "--key-file: the name of the file is empty"),
        ("get t --position-file=", "--position-file: the name of the file is empty"),
        ("ping --key-file /nowhere", "--key-file without --cert-file"),
        ("get t --wait -1", "--wait"),
        ("ping --port 0", "--port"),
        ("ping --port 65536", "--port"),
        ("ping --host [::1", "'[::1' is not an address"),
        ("ping --host 127.0.0.1:1 --port 2", "--host names port 1, but --port is 2"),
        ("ping --host 127.0.0.1:0", "--host: '0' is not a port number"),
        ("ping --host 127.0.0.1:", "'127.0.0.1:' is not an address"),
        ("serve --host 127.0.0.1:1", "--host: should be an address or a host name, without a port"),
        ("ping --timeout soon", "--timeout"),
        ("serve --frobnicate 1", "--frobnicate"),
        ("serve --port", "--port"),
        ("serve --port x", "--port: "),
        ("config --log-level loud", "--log-level: "),
        ("serve --config /nowhere/dsmq.toml", "/nowhere/dsmq.toml: No such file"),
    ],
)
def test_invalid_usage_is_reported(arguments: str, expected: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    words = arguments.split()
    if words[:1] == ["serve"]:
        # In a separate process, because it handles signals.
        done = result(*words)
    else:
        try:
            status = main(words)
        except SystemExit as error:
            status = int(str(error))
        done = status, *capfdbinary.readouterr()
    assert_one_line(done, 2, expected)
    assert len(done[2]) < 400


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DSMQ_PORT", "abc"),
        ("DSMQ_PORT", "0"),
        ("DSMQ_PORT", "nan"),
        ("dsmq_port", "abc"),
        ("DSMQ_HOST", "[::1"),
        ("DSMQ_HOST", "127.0.0.1:1"),
        ("DSMQ_HOST", "unix:"),
        ("DSMQ_AUTH_TOKEN", "two words"),
        ("DSMQ_AUTH_TOKEN", "żółw"),
        ("DSMQ_AUTH_TOKEN", os.fsdecode(b"\xff")),
        ("DSMQ_AUTH_TOKEN_FILE", "/nowhere"),
        ("DSMQ_CONFIG", "/nowhere"),
    ],
)
def test_invalid_variable_is_reported(variable: str, value: str) -> None:
    done = result("ping", env={variable: value})
    assert_one_line(done, 2, "/nowhere: No such file" if value == "/nowhere" else f"{variable}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"port = 0", "port: '0' is not a port"),
        (b"max_topics = 1\nprot = 1", "prot: unknown setting; did you mean port?"),
        (b"host = 'unix:'", "host: 'unix:' is not an address"),
        (b'host = "unix:/a\\u0000b"', "host: 'unix:/a\\x00b' is not an address"),
        (b'host = "a\\u0000b"', "host: 'a\\x00b' is not an address"),
        (b'auth_token = "a\\u0000 b"', "auth_token: should be a token"),
        (b'auth_token_file = "a\\u0000b"', "embedded null"),
        (b'tls_cert_file = "a\\u0000b"', "embedded null"),
        ("port = 1".encode("utf-16"), "should be UTF-8; this looks like UTF-16"),
        (b"host = " + b"[" * 5000, "nested too deeply"),
        (b"port = " + b"9" * 5000, "too many digits"),
    ],
)
def test_invalid_server_config_is_reported(text: bytes, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_bytes(text)
    done = result("ping", env={"DSMQ_CONFIG": str(file)})
    assert_one_line(done, 2, expected)
    assert "\0" not in done[2].decode()


def test_server_config_may_begin_with_byte_order_mark(server: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_bytes(codecs.BOM_UTF8 + b"port = %d" % server.port)
    assert result("ping", env={"DSMQ_CONFIG": str(file)})[0] == 0


def test_service_links_are_not_server_address(server: Daemon) -> None:
    links = {"DSMQ_PORT": "tcp://10.96.3.7:30008", "DSMQ_SERVICE_HOST": "10.96.3.7", "DSMQ_SERVICE_PORT": "30008"}
    assert result("ping", "--port", str(server.port), env=links)[::2] == (0, b"")
    assert_one_line(result("ping", env={**links, "DSMQ_HOST": "[::1"}), 2, "DSMQ_HOST")
    assert_one_line(result("ping", env={"DSMQ_PORT": "http://10.96.3.7:30008"}), 2, "DSMQ_PORT")


@pytest.mark.parametrize("command", ["put t x", "get t", "topics", "ping --host localhost", "bench"])
def test_client_commands_reject_unknown_variables(command: str) -> None:
    expected = "DSMQ_HOSTT: unknown setting; did you mean DSMQ_HOST?"
    assert_one_line(result(*command.split(), env={"DSMQ_HOSTT": "elsewhere"}), 2, expected)


def test_client_commands_accept_server_settings(server: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "dsmq.toml"
    file.write_text("max_topics = 5")
    env = {"DSMQ_CONFIG": str(file), "DSMQ_LOG_LEVEL": "error", "dsmq_max_topics": "5"}
    assert result("ping", "--port", str(server.port), env=env)[::2] == (0, b"")


def test_lower_case_variables_set_server_address(server: Daemon) -> None:
    assert result("ping", env={"dsmq_host": "localhost", "dsmq_port": str(server.port)})[::2] == (0, b"")


def test_token_file_wins_over_token_variable(tmp_path: Path) -> None:
    right, wrong = "the-token-of-the-server", "the-token-of-another-one"
    (tmp_path / "right").write_text(right)
    with daemon(env={"DSMQ_AUTH_TOKEN": right}) as server:
        words = ["ping", "--port", str(server.port)]
        assert result(*words, env={"DSMQ_AUTH_TOKEN": right})[0] == 0
        assert result(*words, env={"DSMQ_AUTH_TOKEN": wrong})[0] == 1
        assert result(*words, "--token-file", str(tmp_path / "right"), env={"DSMQ_AUTH_TOKEN": wrong})[0] == 0
        assert result(*words, env={"DSMQ_AUTH_TOKEN_FILE": str(tmp_path / "right")})[0] == 0


# Files of certificates and keys


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate, its key, encrypted copies of the key, and invalid files."""
    folder = tmp_path_factory.mktemp("pem")
    issued = trustme.CA().issue_cert("localhost")
    for name, blobs in (("cert", issued.cert_chain_pems), ("key", [issued.private_key_pem])):
        for blob in blobs:
            blob.write_to_path(folder / name, append=True)
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(folder / "other")
    key = load_pem_private_key((folder / "key").read_bytes(), None)
    for name, kind in (("locked", PrivateFormat.PKCS8), ("locked_too", PrivateFormat.TraditionalOpenSSL)):
        (folder / name).write_bytes(key.private_bytes(Encoding.PEM, kind, BestAvailableEncryption(b"secret")))
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "secret").touch(0)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cert", "key", "expected"),
    [
        ("cert", "locked", "{key}: {folder}/locked: the private key is encrypted"),
        ("cert", "locked_too", "{key}: {folder}/locked_too: the private key is encrypted"),
        ("key", "cert", "{key}: {folder}/cert: no private key in PEM format found; are key and certificate swapped?"),
        ("cert", "cert", "{key}: {folder}/cert: no private key in PEM format found"),
        ("key", "key", "{cert}: {folder}/key: no certificate in PEM format found"),
        ("cert", "other", "{key}: {folder}/other: the key does not match the certificate"),
        ("empty", "key", "{cert}: {folder}/empty: no certificate in PEM format found"),
        ("cert", "empty", "{key}: {folder}/empty: no private key in PEM format found"),
        ("folder", "key", "{cert}: {folder}/folder: Is a directory"),
        ("cert", "folder", "{key}: {folder}/folder: Is a directory"),
        ("cert", "missing", "{key}: {folder}/missing: No such file or directory"),
        ("secret", "key", "{cert}: {folder}/secret: Permission denied"),
        ("cert", "secret", "{key}: {folder}/secret: Permission denied"),
        ("pipe", "key", "{cert}: {folder}/pipe: not a regular file"),
        ("cert", "pipe", "{key}: {folder}/pipe: not a regular file"),
    ],
)
def test_invalid_certificate_or_key_is_reported(cert: str, key: str, expected: str, pem: Path) -> None:
    files = {"cert-file": str(pem / cert), "key-file": str(pem / key)}
    client = ["ping", *(word for name, file in files.items() for word in (f"--{name}", file))]
    server = ["serve", "--port=0", "--http-port=off", *(f"--tls-{name}={file}" for name, file in files.items())]
    for words, name in ((client, "--{}-file"), (server, "tls_{}_file")):
        done = run_dsmq(*words, prefix=without_privileges())
        about = expected.format(folder=pem, cert=name.format("cert"), key=name.format("key"))
        assert_one_line((done.returncode, done.stdout, done.stderr), 2, f"dsmq: {about}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["empty", "key", "folder", "missing", "pipe", "secret"])
def test_invalid_ca_file_is_reported(name: str, pem: Path) -> None:
    server = f"serve --port 0 --http-port off --tls-cert-file {pem}/cert --tls-key-file {pem}/key --tls-client-ca-file"
    for words, option in (("ping --ca-file", "--ca-file"), (server, "tls_client_ca_file")):
        done = run_dsmq(*words.split(), str(pem / name), prefix=without_privileges())
        assert_one_line((done.returncode, done.stdout, done.stderr), 2, f"dsmq: {option}: {pem}/{name}: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auth-token-file", "http-token-file", "snapshot-file", "config"])
@pytest.mark.parametrize("what", ["folder", "secret"])
def test_unusable_server_file_is_reported(name: str, what: str, pem: Path) -> None:
    done = run_dsmq(*f"serve --port 0 --http-port 0 --{name} {pem}/{what}".split(), prefix=without_privileges())
    lines = done.stderr.decode().splitlines()
    assert done.returncode in (1, 2)
    assert lines[-1].startswith("dsmq: ")
    assert f"{pem}/{what}" in lines[-1]
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("name", ["auth-token-file", "http-token-file"])
def test_server_rejects_endless_token_file(name: str) -> None:
    done = run_dsmq("serve", "--port=0", "--http-port=0", f"--{name}=/dev/zero")
    assert done.returncode in (1, 2)
    assert done.stderr.decode().splitlines()[-1] == "dsmq: /dev/zero: longer than 1048576 bytes"


def test_client_command_rejects_endless_token_file() -> None:
    assert_one_line(result("ping", "--token-file", "/dev/zero"), 2, "/dev/zero: longer than 1048576 bytes")


@pytest.mark.parametrize("option", ["ca-file", "cert-file", "key-file"])
def test_too_long_certificate_file_is_reported(option: str, pem: Path, tmp_path: Path) -> None:
    file = tmp_path / "long"
    with file.open("wb") as stream:
        stream.truncate(2**24 + 1)
    words = ["ping", f"--{option}", str(file), *(["--cert-file", str(pem / "cert")] if option == "key-file" else [])]
    assert_one_line(result(*words), 2, f"{file}: longer than 16777216 bytes")


@pytest.mark.parametrize("command", ["put t x", "put t", "get t", "get t --follow", "topics", "ping", "stats", "stop"])
def test_missing_server_is_reported(command: str) -> None:
    with refusing_address() as (_, port):
        done = result(*command.split(), "--port", str(port), stdin=b"x\n")
    assert_one_line(done, 1, f"no server answers at 127.0.0.1:{port}: start one with `dsmq serve`")


def test_missing_unix_socket_server_is_reported_with_path(tmp_path: Path) -> None:
    host = f"unix:{tmp_path}/socket"
    assert_one_line(result("ping", "--host", host), 1, str(tmp_path))


@pytest.mark.parametrize("host", ["nowhere.invalid", "é" * 60])
def test_unknown_host_is_reported_by_name(host: str) -> None:
    assert_one_line(result("ping", "--host", host), 1, host)
    assert_one_line(result("serve", "--port", "0", "--host", host, "--http-port", "off"), 1, host)


@pytest.mark.parametrize("command", ["ping", "get t", "put t x", "topics"])
def test_proxy_that_closes_connections_is_reported(command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as front:
        port = front.getsockname()[1]

        def close() -> None:
            with suppress(OSError):
                while True:
                    front.accept()[0].close()

        thread = threading.Thread(target=close)
        thread.start()
        done = result(*command.split(), "--port", str(port))
        front.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert_one_line(done, 1, f"dsmq: 127.0.0.1:{port} accepts connections and closes them immediately")
    assert b"(--tls)" in done[2]


def test_other_program_is_reported_as_not_dsmq(server: Daemon) -> None:
    done = result("ping", "--port", str(server.http_port), "--timeout", str(SOON))
    assert_one_line(done, 1, f"127.0.0.1:{server.http_port} is not a dsmq server but dsmq's HTTP endpoint")


@pytest.mark.parametrize("arguments", [["put", "", "x"], ["get", ""]], ids=["put", "get"])
def test_empty_topic_is_reported(arguments: list[str], address: None) -> None:
    status, out, err = result(*arguments)
    assert status in (1, 2)
    assert_one_line((status, out, err), status, "name of the topic is empty")


def test_too_long_topic_is_reported(address: None) -> None:
    assert_one_line(result("put", "x" * 513, "x"), 1, "512 bytes")


def test_topic_that_is_not_utf8_is_reported(address: None) -> None:
    for arguments in (["put", os.fsdecode(b"t\xff"), "x"], ["get", os.fsdecode(b"t\xff")]):
        status, out, err = result(*arguments)
        assert status in (1, 2)
        assert_one_line((status, out, err), status, "UTF-8")


def test_message_argument_need_not_be_utf8(topic: str, mq: DSMQClientSideConnection) -> None:
    assert result("put", topic, os.fsdecode(b"\xff!")) == (0, b"", b"")
    assert mq.get(topic, raw=True) == b"\xff!"


def test_dsmq_alone_prints_help_with_five_examples() -> None:
    status, out, err = result()
    assert (status, out) == (2, b"")
    examples = err.decode().partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 5
    assert all(line.startswith("  dsmq ") for line in examples)
    assert err == result("--help")[1]


@pytest.mark.parametrize("command", ["--help", "get --help", "serve --help"])
def test_help_ignores_invalid_environment(command: str) -> None:
    status, out, err = result(*command.split(), env={"DSMQ_HOST": "100%", "DSMQ_PORT": "%d"})
    assert (status, err) == (0, b"")
    assert b"Exit status: 0 success" in out


def test_serve_help_groups_options_by_subject() -> None:
    lines = result("serve", "--help")[1].decode().splitlines()
    sections = [line for line in lines if re.fullmatch(r"\S.*:", line)]
    # Rules for topics can only be in the file.
    assert sections == ["options:", *(f"{subject}:" for subject in SUBJECTS.values() if subject != "Topics")]
    assert lines.index("Log:") < lines.index(next(line for line in lines if "--log-level" in line))
