"""TLS on a non-blocking socket, for the server and the blocking client."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Sequence
from selectors import EVENT_READ, EVENT_WRITE

from dsmq.errors import ConfigError

_RECORD_BYTES = 16_384
# OpenSSL would search a longer file for a certificate to its end, however long that takes.
_MAX_FILE_BYTES = 16_777_216
# What to do about errors of a client, by OpenSSL's codes and names.
_UNKNOWN_AUTHORITY = "the certificate is not from a trusted authority (ca_file=... names others to trust)"
_ADVICE: dict[int | str | None, str] = {
    18: "self-signed certificate (ca_file=... to trust it)",
    19: _UNKNOWN_AUTHORITY,
    20: _UNKNOWN_AUTHORITY,
    21: _UNKNOWN_AUTHORITY,
    "WRONG_VERSION_NUMBER": "wrong version number; does the server speak TLS?",
    "RECORD_LAYER_FAILURE": "record layer failure; does the server speak TLS?",
}
# Only a server says this, to a client.
_CERTIFICATE_REQUIRED = "TLSV13_ALERT_CERTIFICATE_REQUIRED"


def server_context(cert_file: str, key_file: str, client_ca_file: str) -> ssl.SSLContext:
    """Return a server's context for TLS 1.2 or later. Raises ConfigError.

    The files are in PEM format; without key_file the key is read from cert_file. With client_ca_file, clients have to
    present a certificate of one of those authorities.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load(context, ("tls_cert_file", "tls_key_file", "tls_client_ca_file"), cert_file, key_file, client_ca_file)
    if client_ca_file:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return a client's context that verifies the server's certificate and name. Raises ConfigError.

    ca_file has the authorities to trust instead of the system's; cert_file and key_file are presented to a server that
    requires a certificate.
    """
    context = _for_client()
    if not ca_file:
        context.load_default_certs()
    _load(context, ("cert_file", "key_file", "ca_file"), cert_file or "", key_file or "", ca_file or "")
    return context


def pinned_context(cert_file: str, name: str = "tls_cert_file") -> ssl.SSLContext:
    """Return a client's context that trusts only the server's own certificate, whatever name it is for.

    For health checks on the server's machine, which may use another name. `name` says where the file was set. Raises
    ConfigError.
    """
    context = _for_client()
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load(context, ("", "", name), "", "", cert_file)
    return context


def _for_client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load(context: ssl.SSLContext, names: Sequence[str], cert_file: str, key_file: str, ca_file: str) -> None:
    """Load files; `names` are those of the options that they come from."""
    cert, key, ca = (f"{name}: {file}" for name, file in zip(names, (cert_file, key_file, ca_file), strict=True))
    for source, file in zip((cert, key, ca), (cert_file, key_file, ca_file), strict=True):
        _check_size(source, file)
    try:
        if cert_file:
            # An empty password, so that it does not prompt for one.
            context.load_cert_chain(cert_file, key_file or None, "")
    except (OSError, ValueError) as error:
        raise ConfigError(_wrong_pair(cert, key if key_file else cert, error)) from None
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{ca}: {reason(error)}") from None


def _check_size(source: str, file: str) -> None:
    try:
        size = os.stat(file).st_size if file else 0
    except (OSError, ValueError):
        return  # An error that names it follows.
    if size > _MAX_FILE_BYTES:
        raise ConfigError(f"{source}: longer than {_MAX_FILE_BYTES} bytes")


def _wrong_pair(cert_source: str, key_source: str, error: Exception) -> str:
    """Return what is wrong with a certificate and its key; OpenSSL's own messages hardly differ."""
    try:
        cert, key = _read(cert_source), _read(key_source)
    except ConfigError as unreadable:
        return str(unreadable)
    if b"PRIVATE KEY-----" not in key:
        exchanged = b"CERTIFICATE-----" in key and b"PRIVATE KEY-----" in cert and cert != key
        about = f"; are key and certificate exchanged? {cert_source} holds a key" if exchanged else ""
        return f"{key_source}: no private key in PEM format found{about}"
    if b"ENCRYPTED" in key:
        return f"{key_source}: the private key is encrypted; give it without a passphrase"
    if b"CERTIFICATE-----" not in cert:
        return f"{cert_source}: no certificate in PEM format found"
    return f"{key_source}: {reason(error)}"


def _read(source: str) -> bytes:
    try:
        with open(source.partition(": ")[2], "rb") as stream:
            return stream.read(1_048_576)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return a short description of an error of TLS or of a file."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key does not match the certificate"
        if error.reason == _CERTIFICATE_REQUIRED:
            return "the server requires a certificate (cert_file=..., key_file=...)"
        return error.reason.lower().replace("_", " ") if error.reason else "not in PEM format"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def advice(error: ssl.SSLError) -> str:
    """Return what went wrong for a client, and what to do about it."""
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else error.reason
    return _ADVICE.get(code) or reason(error)


class TLSSocket:
    """A non-blocking TLS connection, with the methods of a socket that dsmq uses."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Raises OSError if the connection is not encrypted."""
        # If the peer has just closed, Python without the fix for CVE-2023-40217 returns a socket that passes received
        # data through unencrypted. Only this None reveals it.
        if sock.session_reused is None:
            sock.close()
            raise ConnectionAbortedError("TLS: the connection ended before the handshake")
        self._socket = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def handshake(self) -> int:
        """Continue the handshake; return the selector event to wait for, or 0 when it is done. Raises OSError."""
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return EVENT_READ
        except ssl.SSLWantWriteError:
            return EVENT_WRITE
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS: {reason(error)}") from None
        return 0

    def recv(self, size: int) -> bytes:
        """Return some received bytes. Raises BlockingIOError if there are none, OSError if it broke.

        It returns the last record completely, even beyond `size`, because selectors don't report decrypted bytes.
        """
        try:
            data = self._socket.recv(size)
            while decrypted := self._socket.pending():
                data += self._socket.recv(decrypted)
            return data
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except ssl.SSLWantWriteError:
            # To read on, TLS has to reply first, but the peer does not read.
            raise ConnectionAbortedError("TLS: the peer does not read") from None
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS: {reason(error)}") from None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send some of the data; what was not sent has to be passed again. Raises as `recv` does."""
        sent = 0
        try:
            # Record by record, because OpenSSL reports progress only when all of a write has been sent.
            with memoryview(data) as view:
                while sent < len(view):
                    sent += self._socket.send(view[sent : sent + _RECORD_BYTES])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not sent and data:
                raise BlockingIOError from None
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS: {reason(error)}") from None
        return sent

    def interrupt(self) -> None:
        """Make a call in another thread fail, without touching OpenSSL, which that thread is using."""
        socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def shutdown(self, how: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            # Sends close_notify, and does not wait for the peer's.
            self._socket.unwrap()
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()


def accept(context: ssl.SSLContext, sock: socket.socket) -> TLSSocket:
    """Return the server's side of a connection; the socket belongs to it. Raises OSError."""
    # Raises if the client is gone already; if wrap_socket found that out, it would leave the socket open.
    sock.getpeername()
    return TLSSocket(context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False))


def connect(context: ssl.SSLContext, sock: socket.socket, host: str) -> TLSSocket:
    """Return the client's side of a connection, after the handshake. Raises OSError."""
    return TLSSocket(context.wrap_socket(sock, server_hostname=host))
