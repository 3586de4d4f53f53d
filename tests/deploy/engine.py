"""A container engine for the tests: Podman with storage, network and settings of its own; it leaves nothing behind.

Where no registry answers, the base image is made of Debian's packages. What the build installs is fetched before, by
the hashes it is locked to, with this machine's own pip and its settings; so the build itself needs no network.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, tool

PYTHON = "3.13"
BASE = f"docker.io/library/python:{PYTHON}-slim"
# The release of Debian that has this Python.
SUITE = "trixie"
LOCKED = [ROOT / "deploy/docker/requirements.txt", ROOT / "deploy/docker/build-requirements.txt"]
# What is to happen in a container has to within this, in seconds: starting one takes some.
SOON = 30.0
LOCKED_DOWN = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


def eventually(condition: Callable[[], bool], seconds: float = SOON) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


class Podman:
    """Podman's command line, on storage in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, **self._write_settings()}
        self._namespace = _namespace()
        self.command = ["nsenter", "--mount", "--net", "--wd=.", f"--target={self._namespace.pid}", "podman"]

    def _write_settings(self) -> dict[str, str]:
        """Write the files that podman is configured by; return the variables that name them."""
        files, processes = (_hard_limit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        texts = {
            "storage": f'[storage]\ndriver = "overlay"\n'
            f'graphroot = "{self.folder}/graphroot"\nrunroot = "{self.folder}/runroot"\n',
            # More than the caller has can't be given to a container.
            "containers": f'[containers]\nlog_driver = "k8s-file"\n'
            f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
            f'[network]\nnetwork_config_dir = "{self.folder}/networks"\n'
            # There need not be a systemd.
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\ntmp_dir = "{self.folder}/libpod"\n',
            "registries": 'unqualified-search-registries = ["docker.io"]\nshort-name-mode = "permissive"\n',
        }
        names = {
            "storage": "CONTAINERS_STORAGE_CONF",
            "containers": "CONTAINERS_CONF",
            "registries": "CONTAINERS_REGISTRIES_CONF",
        }
        for name, text in texts.items():
            (self.folder / f"{name}.conf").write_text(text)
        paths = {variable: str(self.folder / f"{name}.conf") for name, variable in names.items()}
        # Health checks are run by the tests, not by a timer of systemd.
        return {**paths, "DISABLE_HC_SYSTEMD": "true"}

    def __call__(
        self, *words: str, check: bool = True, timeout: float = 300, online: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of podman's; fail with what it says where it does. Only `online` it reaches the world."""
        done = subprocess.run(
            [word for word in (*self.command, *words) if not (online and word == "--net")],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
            check=False,
        )
        assert not check or done.returncode == 0, f"podman {' '.join(words)}\n{done.stdout}{done.stderr}"
        return done

    @contextmanager
    def its_network(self) -> Iterator[None]:
        """Be in the network in which the ports of its containers are, as their host is."""
        with (
            Path(f"/proc/{self._namespace.pid}/ns/net").open() as its,
            Path("/proc/thread-self/ns/net").open() as ours,
        ):
            _setns(its.fileno())
            try:
                yield
            finally:
                _setns(ours.fileno())

    def load(self, archive: Path, name: str) -> None:
        """Take a root file system for an image."""
        self("import", "--change=ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", str(archive), name)

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        return dict(json.loads(self("inspect", f"--type={kind}", name).stdout)[0])

    def close(self) -> None:
        """Remove all that it has made."""
        self("rm", "--all", "--force", "--time=0", check=False)
        self("rmi", "--all", "--force", check=False)
        self._namespace.kill()
        self._namespace.wait()
        _remove_cgroups("libpod_parent")


def _setns(namespace: int) -> None:
    # os.setns is new in Python 3.12. It is this thread that enters.
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


def _hard_limit(kind: int) -> int:
    # Podman lowers its own limit of processes to this before it starts a container.
    most = 32768 if kind == resource.RLIMIT_NPROC else 1_048_576
    limit = resource.getrlimit(kind)[1]
    return most if limit == resource.RLIM_INFINITY else min(limit, most)


def _namespace() -> subprocess.Popen[str]:
    """A process that holds namespaces of mounts and of the network, with which all that is made in them ends."""
    script = """
        set -e
        ip link set lo up
        # What is remembered of networks.
        mkdir -p /var/lib/cni
        mount -t tmpfs none /var/lib/cni
        # crun takes no tree of control groups in which version 2 stands beside version 1.
        if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
        echo ready
        exec sleep infinity
    """
    process = subprocess.Popen(
        ["unshare", "--mount", "--net", "--propagation=private", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        pytest.skip("namespaces of mounts and of the network are not allowed here")
    process.stdout.close()
    return process


def _remove_cgroups(name: str) -> None:
    for found in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        for folder in sorted((path for path in found.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        found.rmdir()


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for an engine. Its path is short, because those of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="dsmq-") as path:
        yield Path(path)


@contextmanager
def podman(folder: Path) -> Iterator[Podman]:
    """An engine that can run containers, or the reason to skip."""
    if os.geteuid():
        pytest.skip("not root, and what these tests need of the machine is not allowed here")
    for name, package in (("podman", "podman"), ("ip", "iproute2"), ("nsenter", "util-linux")):
        tool(name, package)
    engine = Podman(folder)
    try:
        yield engine
    finally:
        engine.close()


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


# Images


def provide_base(engine: Podman) -> None:
    """Have the base image: that of the registry, or else one made of Debian's packages, which is kept."""
    if engine("pull", "--quiet", BASE, check=False, online=True).returncode == 0:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmq-tests"
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"{SUITE}-python{PYTHON}.tar"
    if not archive.exists():
        _make_root(archive)
    engine.load(archive, BASE)


def _make_root(archive: Path) -> None:
    packages = "python3,python3-venv,ca-certificates,dash,coreutils,libc-bin,base-files,media-types,netbase"
    unfinished = archive.with_suffix(".unfinished.tar")
    # Unpacked, not configured: that takes a third of the time, and is enough for Python. But pip wants authorities.
    hooks = [
        *('mkdir -p "$1/usr/local/bin"', 'mkdir -p "$1/etc/ssl/certs"'),
        *(f'ln -s /usr/bin/python3 "$1/usr/local/bin/{name}"' for name in ("python3", "python")),
        'cat "$1"/usr/share/ca-certificates/mozilla/*.crt >"$1/etc/ssl/certs/ca-certificates.crt"',
    ]
    subprocess.run(
        [
            *(tool("mmdebstrap", "mmdebstrap"), "--quiet", "--variant=extract", f"--include={packages}"),
            *(f"--extract-hook={hook}" for hook in hooks),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")),
            *(SUITE, str(unfinished), *_mirror()),
        ],
        check=True,
        timeout=300,
    )
    unfinished.rename(archive)


def _mirror() -> list[str]:
    """The mirror that this machine takes its own packages from, if that can be told."""
    for file in [*sorted(Path("/etc/apt/sources.list.d").glob("*.sources")), Path("/etc/apt/sources.list")]:
        if file.exists() and (
            found := re.search(r"^(?:URIs:|deb(?: \[.*?\])?) *(http\S+)", file.read_text(), re.MULTILINE)
        ):
            return [found[1]]
    return []


def fetch_wheels(folder: Path) -> None:
    """Download what the build installs, by hash."""
    files = [word for file in LOCKED for word in ("--requirement", str(file))]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"),
            *("--only-binary=:all:", f"--python-version={PYTHON}", f"--dest={folder}", *files),
        ],
        check=True,
        timeout=300,
    )


def build(engine: Podman, wheels: Path, context: Path, name: str) -> None:
    """Build the image of the Dockerfile, without a network."""
    engine("build", *offline(wheels), f"--tag={name}", str(context))


def offline(wheels: Path) -> list[str]:
    """The options of a build that finds in `wheels` what it installs. Without the format, HEALTHCHECK is not kept."""
    settings = wheels / "pip.conf"
    settings.write_text("[global]\nno-index = true\nfind-links = /fetched\n")
    return [
        *("--quiet", "--pull=never", "--network=none", "--format=docker"),
        *(f"--volume={wheels}:/fetched:ro", f"--volume={settings}:/etc/pip.conf:ro"),
    ]


# Containers


@dataclass
class Container:
    """A container that runs, or has run."""

    engine: Podman
    id: str

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.engine.inspect("container", self.id)["State"])

    def port(self, inside: int = 30008) -> int:
        """The port of this machine that leads to one of the container."""
        return int(self.engine("port", self.id, str(inside)).stdout.rpartition(":")[2])

    def logs(self) -> tuple[str, str]:
        """What it has said on stdout, and on stderr."""
        done = self.engine("logs", self.id)
        return done.stdout, done.stderr

    def is_serving(self) -> bool:
        return "serves on" in "".join(self.logs()) or not self.state["Running"]

    def check_health(self) -> str:
        """Run the health check once; return what the engine takes the container for."""
        self.engine("healthcheck", "run", self.id, check=False)
        state = self.state
        return str((state.get("Health") or state["Healthcheck"])["Status"])
