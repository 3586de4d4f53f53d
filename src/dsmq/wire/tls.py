"""TLS under a non-blocking socket, for the server and for the blocking client."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from selectors import EVENT_READ, EVENT_WRITE

from dsmq.errors import ConfigError

_RECORD_BYTES = 16_384
# OpenSSL would search a longer file for a certificate to its end, however long that takes.
_MAX_FILE_BYTES = 16_777_216


def server_context(cert_file: str, key_file: str, client_ca_file: str) -> ssl.SSLContext:
    """Return what a server needs to speak TLS 1.2 or later.

    The files are in PEM format; without key_file the key stands in cert_file. With client_ca_file, clients have to
    show a certificate of one of those authorities. Raises ConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    _load(context, cert_file, key_file, client_ca_file)
    if client_ca_file:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """Return what a client needs: the server's certificate and its name are verified.

    ca_file holds the authorities to trust, in place of the system's; cert_file and key_file what to show to a server
    that asks for a certificate. Raises ConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not ca_file:
        context.load_default_certs()
    _load(context, cert_file or "", key_file or "", ca_file or "")
    return context


def neighbour_context(cert_file: str) -> ssl.SSLContext:
    """Return what a client needs that has the server's own certificate: it trusts that alone, for whatever name it is.

    For health checks next to the server, which reach it by other names. Raises ConfigError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load(context, "", "", cert_file)
    return context


def _load(context: ssl.SSLContext, cert_file: str, key_file: str, ca_file: str) -> None:
    for file in (cert_file, key_file, ca_file):
        _check_size(file)
    try:
        if cert_file:
            # The empty password keeps it from asking for one.
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


def _check_size(file: str) -> None:
    try:
        size = os.stat(file).st_size if file else 0
    except (OSError, ValueError):
        return  # An error that names it follows.
    if size > _MAX_FILE_BYTES:
        raise ConfigError(f"{file}: longer than {_MAX_FILE_BYTES} bytes")


def _wrong_pair(cert_file: str, key_file: str) -> str:
    """Return what is wrong with a certificate and its key, because OpenSSL says much the same of everything."""
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
    """Return what went wrong, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is not the one of the certificate"
        return error.reason.lower().replace("_", " ") if error.reason else "not in PEM format"
    return (isinstance(error, OSError) and error.strerror) or str(error)


class TLSSocket:
    """A non-blocking connection under TLS, with the methods of a socket that dsmq uses."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Raises OSError if there is no TLS under it."""
        # If the peer has closed just before, Python without the fix of CVE-2023-40217 returns a socket that passes what
        # has come through unencrypted. Its public sign is this None.
        if sock.session_reused is None:
            sock.close()
            raise ConnectionAbortedError("TLS: the connection ended before the handshake")
        self._socket = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def handshake(self) -> int:
        """Continue the handshake; return the selector event it waits for, 0 once it is done. Raises OSError."""
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
        """Return some of what has come. Raises BlockingIOError when there is nothing, another OSError when it broke.

        It returns all of the last record, which may be more than `size`: no selector reports what is decrypted already.
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
            # To read on it would have to answer; who asks for that and does not read gets no further.
            raise ConnectionAbortedError("TLS: what was sent is not read") from None
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS: {reason(error)}") from None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send some of it; what was refused once has to be offered again. Raises as `recv` does."""
        sent = 0
        try:
            # In records, because OpenSSL tells of none of it before all that it was given has gone.
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
        """Have a call in another thread fail. It touches nothing of OpenSSL, which that thread is using."""
        socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def shutdown(self, how: int) -> None:
        """Say that nothing more comes."""
        with contextlib.suppress(OSError, ValueError):
            # It sends its part, and does not wait for the other's.
            self._socket.unwrap()
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()


def accept(context: ssl.SSLContext, sock: socket.socket) -> TLSSocket:
    """Return the server's side of a connection; the socket belongs to it. Raises OSError."""
    # Where the client has gone already; to find that out there, wrap_socket would leave the socket open.
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
