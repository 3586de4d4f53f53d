"""TLS between clients and servers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trustme

from conftest import (
    CONNECTS,
    SOON,
    UNIT,
    Connect,
    blocked,
    loop_of,
    reload,
    run_dsmq,
    serving,
    tool,
    wait_until,
    wire_to,
)
from dsmq import aio
from dsmq import settings as config
from dsmq.broker import transport
from dsmq.broker.states import LINGERING
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.client.connection import LONG_PAUSE_SECONDS
from dsmq.errors import ClientClosed, ConfigError
from dsmq.server import Server
from dsmq.wire import tls
from dsmq.wire.resp import encode_request
from security import ADMIN, Files


@CONNECTS
def test_tls_error_names_address_and_remedy(connect: Connect, files: Files, server: Server) -> None:
    trustme.CA().cert_pem.write_to_path(files.folder / "other.pem")
    named = files.issue(files.authority, "named", "a.example", "*.b.example", "10.0.0.1")

    def error_of(port: int, **options: Any) -> str:
        with pytest.raises(ConnectionError) as error:
            connect(port=port, retry=False, **options)
        assert f"127.0.0.1:{port}: " in str(error.value)
        return str(error.value)

    with serving(tls_cert_file=files.server) as one:
        for options in ({"tls": True}, {"ca_file": str(files.folder / "other.pem")}):
            assert "the certificate is not from a trusted authority (ca_file=" in error_of(one.port, **options)
    with serving(tls_cert_file=named) as one:
        about = error_of(one.port, ca_file=files.ca)
        assert "not valid for '127.0.0.1'" in about
    with serving(tls_cert_file=files.server, tls_client_ca_file=files.ca) as one:
        # The asyncio client may be refused before it has read the reason.
        assert re.search("requires a certificate|Broken pipe", error_of(one.port, ca_file=files.ca))
    assert "does the server speak TLS?" in error_of(server.port, tls=True)


def test_tls_connection_ends_if_decrypted_bytes_may_be_lost() -> None:
    sock = Mock(ssl.SSLSocket, session_reused=False)
    sock.recv.side_effect = [b"*1", MemoryError]
    sock.pending.return_value = 1
    with pytest.raises(ConnectionAbortedError, match="out of memory"):
        tls.TLSSocket(sock).recv(2)


@CONNECTS
def test_tls_proxy_without_server_is_explained(connect: Connect, files: Files) -> None:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with context.wrap_socket(listener.accept()[0], server_side=True) as sock:
                    sock.recv(65_536)

    context = tls.server_context(files.server, "", "")
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as listener:
        pool.submit(serve)
        with pytest.raises(ConnectionError, match=r"is the server behind it up\? does it speak TLS\?"):
            connect(port=listener.getsockname()[1], ca_file=files.ca, retry=False)
        listener.shutdown(socket.SHUT_RDWR)


def test_put_and_get_over_tls(tls_server: Server, files: Files) -> None:
    with connect(port=tls_server.port, ca_file=files.ca, token=ADMIN) as mq:
        assert mq.put("t", "x") == 1
        assert mq.get("t") == "x"
        long = [bytes([number]) * 300_000 for number in range(30)]
        assert mq.put_many("t", long) == list(range(2, 32))
        assert mq.get_many("t", 30, raw=True) == long
        assert mq.get_wait("t", timeout=UNIT) == ""
    with connect("localhost", tls_server.port, tls=ssl.create_default_context(cafile=files.ca), token=ADMIN) as mq:
        mq.ping()


def test_asyncio_put_and_get_over_tls(tls_server: Server, files: Files) -> None:
    async def main() -> None:
        async with await aio.connect(port=tls_server.port, ca_file=files.ca, token=ADMIN) as mq:
            await mq.put("t", "x" * 300_000)
            assert await mq.get("t") == "x" * 300_000

    asyncio.run(main())


def test_client_verifies_certificate_and_hostname(tls_server: Server, tmp_path: Path, authority: trustme.CA) -> None:
    (tmp_path / "other").mkdir()
    strange = Files(tmp_path / "other", trustme.CA())
    with pytest.raises(ConnectionError, match="not from a trusted authority"):
        connect(port=tls_server.port, ca_file=strange.ca, token=ADMIN, retry=False)
    with pytest.raises(ConnectionError, match="not from a trusted authority"):
        connect(port=tls_server.port, tls=True, token=ADMIN, retry=False)
    files = Files(tmp_path, authority)
    named = files.issue(authority, "named", "dsmq.example.org")
    with serving(tls_cert_file=named) as server, pytest.raises(ConnectionError, match="IP address mismatch"):
        connect(port=server.port, ca_file=files.ca, retry=False)


def test_client_sends_certificate_if_required(files: Files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    strange = Files(tmp_path / "other", trustme.CA())
    with serving(tls_cert_file=files.server, tls_client_ca_file=files.ca, host="0.0.0.0") as server:
        for cert_file in (None, strange.client):
            with pytest.raises(ConnectionError):
                connect(port=server.port, ca_file=files.ca, cert_file=cert_file, retry=False)
        with connect(port=server.port, ca_file=files.ca, cert_file=files.client) as mq:
            assert mq.put("t", "x") == 1


def test_tls_and_plain_text_mismatch_is_an_error(tls_server: Server) -> None:
    with pytest.raises(ConnectionError, match="does it require TLS"):
        connect(port=tls_server.port, token=ADMIN, retry=False)
    with serving() as plain, pytest.raises(ConnectionError, match="does the server speak TLS"):
        connect(port=plain.port, tls=True, retry=False)


def test_old_versions_of_tls_are_refused(tls_server: Server, files: Files) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=files.ca)
        context.minimum_version = context.maximum_version = version
        connect(port=tls_server.port, tls=context, token=ADMIN).close()
    old = ssl.create_default_context(cafile=files.ca)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ConnectionError):
        connect(port=tls_server.port, tls=old, token=ADMIN, retry=False)


def test_stalled_handshake_times_out_and_affects_no_one(files: Files) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tls_cert_file=files.server, auth_timeout_seconds=600))
        silent, half = (stack.enter_context(wire_to(server)) for _ in range(2))
        half.send(bytes.fromhex("16030100c8010000c40303"))
        mq = stack.enter_context(connect(port=server.port, ca_file=files.ca))
        garbage = stack.enter_context(wire_to(server))
        garbage.send(b"GET / HTTP/1.1\r\n\r\n")
        reload(server, auth_timeout_seconds=UNIT)
        for sock in (garbage, silent, half):
            with contextlib.suppress(ConnectionResetError):
                while sock.socket.recv(4096):
                    pass
        mq.ping()
        # Connections that have finished the handshake stay.
        wait_until(lambda: server.status.connections() == 1)


def tls_to(server: Server, files: Files) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", server.port), SOON)
    return ssl.create_default_context(cafile=files.ca).wrap_socket(raw, server_hostname="127.0.0.1")


def test_idle_client_after_handshake_is_not_evicted(files: Files) -> None:
    limits = {"auth_timeout_seconds": 600, "max_unauthenticated_connections": 1}
    with serving(tls_cert_file=files.server, **limits) as server, contextlib.ExitStack() as stack:
        idle = []
        for _ in range(3):
            idle.append(stack.enter_context(tls_to(server, files)))
            # The client's handshake ends before the server's.
            wait_until(lambda: server.context.usage.unauthenticated.total == 0)
        reload(server, auth_timeout_seconds=UNIT)
        time.sleep(3 * UNIT)
        for sock in idle:
            sock.sendall(b"PING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"


def test_handshake_alone_does_not_replace_token(tls_server: Server, files: Files) -> None:
    with tls_to(tls_server, files) as sock:
        sock.sendall(b"PING\r\n")
        assert sock.recv(100) == b"+PONG\r\n"
        assert tls_server.context.usage.unauthenticated.total == 1


def test_client_that_has_sent_a_request_receives_the_alert(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LINGER_SECONDS", SOON)
    with serving(tls_cert_file=files.server, tls_client_ca_file=files.ca) as server, tls_to(server, files) as sock:
        # With TLS 1.3, the client's handshake ends before the server checks its certificate.
        sock.sendall(b"PING\r\n")
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            sock.recv(100)
        # If the server closed now, the kernel would reset the connection, and asyncio would report only that.
        wait_until(lambda: [connection.state for connection in loop_of(server).connections] == [LINGERING])
        sock.close()
        wait_until(lambda: server.status.connections() == 0)


def test_all_decrypted_requests_run_at_once(files: Files) -> None:
    # A record is four times as long as the data received at once from an unauthenticated client.
    settings = {"tls_cert_file": files.server, "auth_token": ADMIN, "max_unauthenticated_bytes": 4096}
    with serving(**settings) as server, tls_to(server, files) as sock:
        ping = encode_request(b"PING", b"x" * 3900)
        sock.sendall(ping * 4)
        got = b""
        while len(got) < 4 * 3908:
            got += sock.recv(65_536)
        assert got == b"$3900\r\n%b\r\n" % (b"x" * 3900) * 4


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_client_that_ends_its_stream_without_close_notify_gets_its_replies(
    files: Files, version: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context(cafile=files.ca)
    context.minimum_version = context.maximum_version = version
    with serving(tls_cert_file=files.server) as server, socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(SOON)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as sock:
            sock.sendall(b"PING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"
            with blocked(server):
                sock.sendall(b"PING\r\n" * 3)
                # The method of SSLSocket would discard the encryption.
                socket.socket.shutdown(sock, socket.SHUT_WR)
            got = b""
            while data := sock.recv(100):
                got += data
            assert got == b"+PONG\r\n" * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
def test_invalid_tls_file_is_reported(files: Files, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for file in (str(bad), "/nowhere"):
        settings = {"tls_cert_file": files.server, name: file}
        options = [word for key, value in settings.items() for word in (config.option(key), value)]
        done = run_dsmq("serve", "--port", "0", *options)
        assert done.returncode == 2
        assert file.encode() in done.stderr


def test_encrypted_key_is_refused_without_prompt(files: Files, tmp_path: Path) -> None:
    tool("openssl", "openssl")
    key = tmp_path / "encrypted.pem"
    done = subprocess.run(
        ["openssl", "pkey", "-in", files.server, "-aes256", "-passout", "pass:x", "-out", str(key)], check=False
    )
    assert done.returncode == 0
    assert run_dsmq("serve", "--port", "0", "--tls-cert-file", files.server, "--tls-key-file", str(key)).returncode == 2


def test_inconsistent_tls_settings_are_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="tls_key_file is set without tls_cert_file"):
        config.load(tls_key_file=files.server)
    with pytest.raises(TypeError):
        connect(tls=ssl.create_default_context(), ca_file=files.ca)


def test_redis_cli_works_with_tls_and_token(tls_server: Server, files: Files) -> None:
    redis_cli = tool("redis-cli", "redis-tools")
    command = [redis_cli, "--tls", "--cacert", files.ca, "-p", str(tls_server.port), "-a", ADMIN, "--no-auth-warning"]
    done = subprocess.run([*command, "PUT", "t", "x"], capture_output=True, text=True, timeout=SOON, check=False)
    assert done.stdout.strip() == "1"


def test_redis_py_works_with_tls_and_token(tls_server: Server, files: Files) -> None:
    redis = pytest.importorskip("redis")
    for protocol in (2, 3):
        with redis.Redis(port=tls_server.port, ssl=True, ssl_ca_certs=files.ca, password=ADMIN, protocol=protocol) as r:
            assert r.execute_command("PUT", "t", "x") > 0


def test_client_without_tls_does_not_import_ssl() -> None:
    code = "import sys, dsmq.client, dsmq.broker.auth; sys.exit('ssl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_closed_tls_connection_is_detected(files: Files) -> None:
    with contextlib.ExitStack() as stack, serving(tls_cert_file=files.server) as first:
        mq = stack.enter_context(connect(port=first.port, ca_file=files.ca))
        assert mq.put("t", "x") == 1
        time.sleep(2 * LONG_PAUSE_SECONDS)
        # The connection is still open.
        assert mq.put("t", "x") == 2
        first.stop()
        stack.enter_context(serving(port=mq.port, tls_cert_file=files.server))
        time.sleep(2 * LONG_PAUSE_SECONDS)
        # If the put had been sent on the old connection, it would be uncertain whether the new run stored it.
        assert mq.put("t", "x" * 6_000_000) == 1


def test_slow_tls_reader_is_not_dropped(files: Files) -> None:
    with serving(tls_cert_file=files.server, reply_timeout_seconds=15 * UNIT) as server:
        with connect(port=server.port, ca_file=files.ca) as mq:
            mq.put("t", "x" * 6_000_000)
        context = ssl.create_default_context(cafile=files.ca)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as sock:
                sock.sendall(encode_request(b"READ", b"t", b"0"))
                got, began = 0, time.monotonic()
                while got < 6_000_000:
                    data = sock.recv(16_384)
                    assert data, f"dropped after {got} bytes"
                    got += len(data)
                    # In total, this takes longer than reply_timeout_seconds.
                    time.sleep(max(0.0, began + 25 * UNIT * got / 6_000_000 - time.monotonic()))


def test_closing_tls_client_in_use_by_threads_is_safe(files: Files) -> None:
    def use(mq: DSMQClientSideConnection) -> None:
        while True:
            mq.put_many("t", ["x" * 20_000] * 20)
            mq.get_many("t", timeout=0.001)

    with serving(tls_cert_file=files.server) as server, ThreadPoolExecutor(3) as threads:
        for number in range(15):
            mq = connect(port=server.port, ca_file=files.ca)
            users = [threads.submit(use, mq) for _ in range(3)]
            wait_until(lambda: server.status.totals().stored > 0)
            time.sleep(number * UNIT / 100)
            mq.close()
            for user in users:
                with pytest.raises(ClientClosed):
                    user.result()


def test_connection_closed_before_accept_is_not_an_error(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tls_cert_file=files.server) as server:
        with blocked(server):
            for data in (b"", b"x"):
                with wire_to(server) as gone:
                    gone.send(data)
                    gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connect(port=server.port, ca_file=files.ca).close()
        assert "failed" not in caplog.text
        wait_until(lambda: server.context.usage.connections.total == 0)


class WithoutFix(ssl.SSLSocket):
    """A socket as Python before 3.11.5 makes it if the client has already closed (CVE-2023-40217)."""

    def getpeername(self) -> object:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        if size == 1:
            # The fix checks for data received before the handshake.
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return super().recv(size, flags)


@pytest.mark.parametrize("accepts", [True, False], ids=["server", "client"])
def test_plain_text_before_handshake_is_never_run(files: Files, accepts: bool) -> None:
    context = tls.server_context(files.server, "", "") if accepts else tls.client_context(None, None, None)
    context.sslsocket_class = WithoutFix
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
        with client, ours:
            client.sendall(encode_request(b"SHUTDOWN"))
            with pytest.raises(ConnectionAbortedError, match="before the handshake"):
                tls.accept(context, ours) if accepts else tls.connect(context, ours, "localhost")


@pytest.mark.parametrize(
    "arguments",
    [{"tsl": True}, {"tls": 1}, {"tls": "yes"}, {"ca_fle": "x"}, {"key_file": "x"}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_invalid_tls_argument_raises(server: Server, arguments: dict[str, object]) -> None:
    with pytest.raises((TypeError, ConfigError)):
        connect(port=server.port, retry=False, token=ADMIN, **arguments)  # type: ignore[arg-type]
    assert server.status.counters().opened == 0


def test_forked_client_opens_its_own_tls_connection(tls_server: Server, files: Files) -> None:
    mq: DSMQClientSideConnection
    with connect(port=tls_server.port, ca_file=files.ca, token=ADMIN) as mq:
        mq.put("t", "x")
        child = os.fork()
        if not child:
            os._exit(0 if mq.get("t") == "x" and mq.put("t", "y") else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [mq.get("t"), mq.get("t")] == ["x", "y"]
