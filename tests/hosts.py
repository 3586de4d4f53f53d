"""Hosts on their own network: network namespaces connected to one switch."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import tool

# Reserved for documentation (RFC 5737), so that nothing is reached by mistake.
NETWORK = "192.0.2"


class Host:
    """A host with an address and a link to the switch that can be cut."""

    def __init__(self, ip: str, switch: str, number: int) -> None:
        self.address = f"{NETWORK}.{number}"
        self._ip, self._switch, self._link = ip, switch, f"link{number}"
        self.name = f"{switch}-{number}"
        self.prefix = [ip, "netns", "exec", self.name]
        """Runs a command on it."""

    def connect(self) -> None:
        """Connect it to the switch."""
        for command in (
            ["netns", "add", self.name],
            ["-n", self._switch, "link", "add", self._link, "type", "veth", "peer", "eth0", "netns", self.name],
            ["-n", self._switch, "link", "set", self._link, "master", "switch", "up"],
            ["-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0"],
            ["-n", self.name, "link", "set", "lo", "up"],
            ["-n", self.name, "link", "set", "eth0", "up"],
        ):
            _run(self._ip, *command)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Pull its cable: nothing arrives, and neither side notices."""
        _run(self._ip, "-n", self._switch, "link", "set", self._link, "down")
        try:
            yield
        finally:
            _run(self._ip, "-n", self._switch, "link", "set", self._link, "up")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run this thread and those that it starts on the host."""
        with network(Path("/run/netns", self.name)):
            yield


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Connected hosts; skips if they are not allowed here."""
    ip = tool("ip", "iproute2")
    switch = f"dsmq-{os.getpid()}"
    found = [Host(ip, switch, number) for number in range(1, count + 1)]
    try:
        try:
            _run(ip, "netns", "add", switch)
            _run(ip, "-n", switch, "link", "add", "switch", "type", "bridge")
            _run(ip, "-n", switch, "link", "set", "switch", "up")
            for host in found:
                host.connect()
        except OSError as error:
            pytest.skip(f"not allowed here: {error}")
        yield found
    finally:
        for name in (switch, *(host.name for host in found)):
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


@contextmanager
def network(namespace: Path) -> Iterator[None]:
    """Run this thread and those that it starts in a network namespace."""
    with namespace.open() as its, Path("/proc/thread-self/ns/net").open() as ours:
        _enter(its.fileno())
        try:
            yield
        finally:
            _enter(ours.fileno())


def _enter(namespace: int) -> None:
    # os.setns is new in Python 3.12.
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


def _run(ip: str, *words: str) -> None:
    """Run a command. Raises OSError."""
    done = subprocess.run([ip, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
