"""TLS on a non-blocking socket, for the server and the blocking client."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from selectors import EVENT_READ, EVENT_WRITE
from typing import TypeAlias

from dsmq.errors import ConfigError

_RECORD_BYTES = 16_384
# Without a limit, OpenSSL would search a whole file for a certificate, however long it is.
_MAX_FILE_BYTES = 16_777_216
# Advice to clients for an error, by OpenSSL's code or name.
_UNKNOWN_AUTHORITY = "the certificate is not from a trusted authority (ca_file=... to trust another)"
_ADVICE: dict[int | str | None, str] = {
    18: "self-signed certificate (ca_file=... to trust it)",
    19: _UNKNOWN_AUTHORITY,
    20: _UNKNOWN_AUTHORITY,
    21: _UNKNOWN_AUTHORITY,
    "WRONG_VERSION_NUMBER": "wrong version number; does the server speak TLS?",
    "RECORD_LAYER_FAILURE": "record layer failure; does the server speak TLS?",
}
_REASONS = {
    "KEY_VALUES_MISMATCH": "the key does not match the certificate",
    # Only a server sends this alert.
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server requires a certificate (cert_file=..., key_file=...)",
    "": "not in PEM format",
    None: "not in PEM format",
}

_Source: TypeAlias = tuple[str, str]
"""A setting and the file that it names."""


def server_context(cert_file: str, key_file: str, client_ca_file: str) -> ssl.SSLContext:
    """Return a server's context from files in PEM format. Raises ConfigError.

    Without key_file, the key is read from cert_file. With client_ca_file, clients must present a certificate issued by
    one of these authorities.
    """
    context = _new_context(ssl.PROTOCOL_TLS_SERVER)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # Otherwise, OpenSSL 3 sends no replies to a client that ends its stream without close_notify. Older versions do.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    _load_pair(context, ("tls_cert_file", cert_file), ("tls_key_file", key_file))
    if client_ca_file:
        _load_authorities(context, ("tls_client_ca_file", client_ca_file))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    ca_file: str | None, cert_file: str | None = None, key_file: str | None = None, *, ca_name: str = "ca_file"
) -> ssl.SSLContext:
    """Return a client's context that verifies the server's certificate and name. Raises ConfigError.

    ca_file contains the authorities to trust instead of the system's; `ca_name` is the name of its setting. cert_file
    and key_file are for servers that require a client certificate.
    """
    context = _new_context(ssl.PROTOCOL_TLS_CLIENT)
    if cert_file:
        _load_pair(context, ("cert_file", cert_file), ("key_file", key_file or ""))
    if ca_file:
        _load_authorities(context, (ca_name, ca_file))
    else:
        context.load_default_certs()
    return context


def pinned_context(cert_file: str, name: str = "tls_cert_file") -> ssl.SSLContext:
    """Return a client's context that trusts only the server's own certificate, under any host name.

    For health checks on the server's machine. `name` is the setting that the file comes from. Raises ConfigError.
    """
    context = _new_context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _load_authorities(context, (name, cert_file))
    return context


def _new_context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load_authorities(context: ssl.SSLContext, source: _Source) -> None:
    _check_file(source)
    try:
        context.load_verify_locations(source[1])
    except (OSError, ValueError) as error:
        raise _invalid(source, reason(error)) from None


def _load_pair(context: ssl.SSLContext, cert: _Source, key: _Source) -> None:
    key = key if key[1] else cert
    _check_file(cert)
    _check_file(key)
    try:
        # An empty password keeps OpenSSL from prompting for one.
        context.load_cert_chain(cert[1], key[1], "")
    except (OSError, ValueError) as error:
        raise _pair_error(cert, key, error) from None


def _check_file(source: _Source) -> None:
    path = source[1]
    if os.path.isfile(path):
        if os.path.getsize(path) > _MAX_FILE_BYTES:
            raise _invalid(source, f"longer than {_MAX_FILE_BYTES} bytes")
    elif os.path.exists(path) and not os.path.isdir(path):
        # A pipe may never end, and can't be read again in a reload.
        raise _invalid(source, "not a regular file")


def _pair_error(cert: _Source, key: _Source, error: Exception) -> ConfigError:
    """Explain what is wrong with a certificate and its key. OpenSSL reports most mistakes with the same error."""
    try:
        cert_text, key_text = _read(cert), _read(key)
    except ConfigError as unreadable:
        return unreadable
    if b"PRIVATE KEY-----" not in key_text:
        is_swapped = b"CERTIFICATE-----" in key_text and b"PRIVATE KEY-----" in cert_text
        hint = f"; are key and certificate swapped? {cert[0]}: {cert[1]} contains a key" if is_swapped else ""
        return _invalid(key, f"no private key in PEM format found{hint}")
    if b"ENCRYPTED" in key_text:
        return _invalid(key, "the private key is encrypted; provide it without a passphrase")
    if b"CERTIFICATE-----" not in cert_text:
        return _invalid(cert, "no certificate in PEM format found")
    return _invalid(key, reason(error))


def _read(source: _Source) -> bytes:
    try:
        with open(source[1], "rb") as stream:
            return stream.read(1_048_576)
    except (OSError, ValueError) as error:
        raise _invalid(source, reason(error)) from None


def _invalid(source: _Source, about: str) -> ConfigError:
    return ConfigError(f"{source[0]}: {source[1]}: {about}")


def reason(error: Exception) -> str:
    """Return a short description of a TLS or file error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(error.reason) or error.reason.lower().replace("_", " ")
    return (isinstance(error, OSError) and error.strerror) or str(error)


def advice(error: ssl.SSLError) -> str:
    """Return a description for users of the client."""
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else error.reason
    return _ADVICE.get(code) or reason(error)


class TLSSocket:
    """A non-blocking TLS connection, with the methods of a socket that dsmq uses."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Raises OSError if the connection is not encrypted."""
        # If the peer has just closed the connection, Python without the fix for CVE-2023-40217 returns a socket that
        # passes received data through unencrypted. Only session_reused reveals this.
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
        """Return some received bytes. Raises BlockingIOError if there are none, OSError on failure.

        Returns the last record completely, even beyond `size`, because selectors don't report decrypted bytes.
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
            # TLS has to send something before it can continue reading, but the peer does not read.
            raise ConnectionAbortedError("TLS: the peer does not read") from None
        except MemoryError:
            # Decrypted bytes may be lost, so what follows must not be used.
            raise ConnectionAbortedError("TLS: out of memory") from None
        except ssl.SSLError as error:
            raise ConnectionAbortedError(f"TLS: {reason(error)}") from None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Send some of the data; the rest must be passed again. Raises as `recv` does."""
        sent = 0
        try:
            # Send record by record, because OpenSSL reports progress only when a whole write has been sent.
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
            # Sends close_notify but does not wait for the peer's.
            self._socket.unwrap()
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()


def accept(context: ssl.SSLContext, sock: socket.socket) -> TLSSocket:
    """Return the server's side of a connection, which takes over the socket. Raises OSError."""
    # Raises if the client has already gone; if wrap_socket raised that instead, the socket would stay open.
    sock.getpeername()
    return TLSSocket(context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False))


def connect(context: ssl.SSLContext, sock: socket.socket, host: str) -> TLSSocket:
    """Return the client's side of a connection, after the handshake. Raises OSError."""
    return TLSSocket(context.wrap_socket(sock, server_hostname=host))
