"""TLS on a non-blocking socket, for the server and the blocking client."""

from __future__ import annotations

import contextlib
import socket
import ssl
from selectors import EVENT_READ, EVENT_WRITE

from dsmq.errors import ConfigError

_RECORD_BYTES = 16_384


def server_context(cert_file: str, key_file: str, client_ca_file: str) -> ssl.SSLContext:
    """Return a server's context for TLS 1.2 or later. Raises ConfigError.

    The files are in PEM format; without key_file the key is read from cert_file. With client_ca_file, clients have to
    present a certificate of one of those authorities.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load(context, cert_file, key_file, client_ca_file)
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
    _load(context, cert_file or "", key_file or "", ca_file or "")
    return context


def pinned_context(cert_file: str) -> ssl.SSLContext:
    """Return a client's context that trusts only the server's own certificate, whatever name it is for.

    For health checks on the server's machine, which may use another name. Raises ConfigError.
    """
    context = _for_client()
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load(context, "", "", cert_file)
    return context


def _for_client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load(context: ssl.SSLContext, cert_file: str, key_file: str, ca_file: str) -> None:
    try:
        if cert_file:
            # An empty password, so that it does not prompt for one.
            context.load_cert_chain(cert_file, key_file or None, "")
    except (OSError, ValueError) as error:
        key_file = key_file or cert_file
        about = _wrong_pair(cert_file, key_file) or f"certificate {cert_file}, key {key_file}: {reason(error)}"
        raise ConfigError(about) from None
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"authorities {ca_file}: {reason(error)}") from None


def _wrong_pair(cert_file: str, key_file: str) -> str:
    """Return what is wrong with a certificate and its key; OpenSSL's own messages hardly differ."""
    try:
        cert, key = _read(cert_file), _read(key_file)
    except ConfigError as error:
        return str(error)
    if b"PRIVATE KEY-----" not in key:
        exchanged = b"CERTIFICATE-----" in key and b"PRIVATE KEY-----" in cert and cert_file != key_file
        about = f"; are key and certificate exchanged? {cert_file} holds a key" if exchanged else ""
        return f"{key_file}: no private key in PEM format found{about}"
    if b"ENCRYPTED" in key:
        return f"{key_file}: the private key is encrypted; give it without a passphrase"
    if b"CERTIFICATE-----" not in cert:
        return f"{cert_file}: no certificate in PEM format found"
    return ""


def _read(file: str) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(1_048_576)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Return a short description of an error of TLS or of a file."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key does not match the certificate"
        return error.reason.lower().replace("_", " ") if error.reason else "not in PEM format"
    return (isinstance(error, OSError) and error.strerror) or str(error)


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
    try:
        return TLSSocket(context.wrap_socket(sock, server_hostname=host))
    except ssl.SSLError as error:
        hint = (
            "; does the server speak TLS?" if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE") else ""
        )
        raise ConnectionAbortedError(f"TLS: {reason(error)}{hint}") from None
