"""Container engines for the tests, with their own storage, network and settings; they leave nothing behind.

If no registry answers, the base image is made from Debian packages. The packages that the build installs are downloaded
first, by their locked hashes, with this machine's pip and its settings, so that the build itself needs no network.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, SOON, tool, wait_until
from engine import binary
from hosts import network

PYTHON = "3.13"
BASE = f"python:{PYTHON}-slim"
# The same with a C compiler.
BUILD_BASE = f"python:{PYTHON}"
IMAGE = "dsmq"
# The Debian release with this Python.
SUITE = "trixie"
PACKAGES = {
    BASE: "python3,python3-venv,ca-certificates,dash,coreutils,libc-bin,base-files,media-types,netbase",
}
PACKAGES[BUILD_BASE] = f"{PACKAGES[BASE]},python3-dev,gcc,libc6-dev"
LOCKED = [ROOT / "deploy/docker/requirements.txt", ROOT / "deploy/docker/build-requirements.txt"]
LOCKED_DOWN = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


class Engine:
    """The command line of a container engine with its own network, which stores everything in `folder`."""

    remove: tuple[str, ...] = ("rm", "--force")
    cgroups: str
    health_options: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace = _namespace()
        self.environment = dict(os.environ)
        self.command: list[str] = []

    def enter(self) -> list[str]:
        """Return the command that runs another one in the engine's namespaces."""
        return ["nsenter", "--mount", "--net", "--wd=.", f"--target={self.namespace.pid}"]

    def __call__(
        self, *words: str, check: bool = True, timeout: float = 300, online: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine; if it fails, show its output. It has access to the internet only if `online`."""
        done = subprocess.run(
            [word for word in (*self.command, *words) if not (online and word == "--net")],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done

    @contextmanager
    def its_network(self) -> Iterator[None]:
        """Enter the network namespace of its containers' ports."""
        with network(Path(f"/proc/{self.namespace.pid}/ns/net")):
            yield

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        return dict(json.loads(self("inspect", f"--type={kind}", name).stdout)[0])

    def size(self, image: str) -> int:
        return int(self("image", "inspect", "--format={{.Size}}", image).stdout)

    def close(self) -> None:
        """Remove everything that it has created."""
        self.namespace.kill()
        self.namespace.wait()
        _remove_cgroups(self.cgroups)


class Podman(Engine):
    remove = ("rm", "--force", "--ignore", "--time=0")
    cgroups = "libpod_parent"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment |= self._write_settings()
        self.command = [*self.enter(), "podman"]

    def _write_settings(self) -> dict[str, str]:
        """Write podman's configuration files; return the variables that point to them."""
        files, processes = (_hard_limit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        storage, containers = self.folder / "storage.conf", self.folder / "containers.conf"
        storage.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/graphroot"\nrunroot = "{self.folder}/runroot"\n'
        )
        containers.write_text(
            # A container can't have more than the caller.
            f'[containers]\nlog_driver = "k8s-file"\n'
            f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
            f'[network]\nnetwork_config_dir = "{self.folder}/networks"\n'
            # systemd may not be running.
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\ntmp_dir = "{self.folder}/libpod"\n'
        )
        # The tests run the health checks themselves, because systemd has no timer for them.
        return {
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(containers),
            "DISABLE_HC_SYSTEMD": "true",
        }

    def healthcheck(self, container: str) -> None:
        """Run the health check once."""
        self("healthcheck", "run", container, check=False)

    def close(self) -> None:
        self("rm", "--all", "--force", "--time=0", check=False)
        self("rmi", "--all", "--force", check=False)
        super().close()


class Docker(Engine):
    """Docker, with its own daemon."""

    cgroups = "dsmq-tests"
    # The daemon runs the health checks, more often than in production, to save time.
    health_options = ("--health-interval=1s", "--health-retries=1")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "daemon.json").write_text("{}")
        (folder / "tmp").mkdir()
        self.environment |= {
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "DOCKER_CONFIG": f"{folder}/client",
            "DOCKER_BUILDKIT": "1",
            "TMPDIR": f"{folder}/tmp",
        }
        # Prefer Debian's docker, which includes BuildKit; others need a plug-in.
        self.command = [shutil.which("docker", path=f"/usr/bin:{os.environ['PATH']}") or "docker"]
        words = [f"--config-file={folder}/daemon.json", f"--data-root={folder}/data", f"--exec-root={folder}/exec"]
        words += [f"--pidfile={folder}/pid", f"--host=unix://{folder}/docker.sock", f"--cgroup-parent=/{self.cgroups}"]
        words += ["--exec-opt=native.cgroupdriver=cgroupfs"]
        with (folder / "log").open("w") as log:
            self._daemon = subprocess.Popen(
                [*self.enter(), "dockerd", *words], stdout=log, stderr=log, env=self.environment
            )

    def is_there(self) -> bool:
        """Return whether the daemon answers."""
        assert self._daemon.poll() is None, (self.folder / "log").read_text()
        return self("version", check=False).returncode == 0

    def healthcheck(self, container: str) -> None:
        """Do nothing: the daemon runs health checks itself."""

    def close(self) -> None:
        for container in self("ps", "--all", "--quiet", check=False).stdout.split():
            self(*self.remove, container, check=False)
        self._daemon.terminate()
        self._daemon.wait(SOON)
        super().close()


def _hard_limit(kind: int) -> int:
    # Podman lowers its own limit on processes to this before it starts a container.
    most = 32768 if kind == resource.RLIMIT_NPROC else 1_048_576
    limit = resource.getrlimit(kind)[1]
    return most if limit == resource.RLIM_INFINITY else min(limit, most)


def _namespace() -> subprocess.Popen[str]:
    """Start a process that holds a mount and a network namespace, which end with it."""
    script = """
        set -e
        ip link set lo up
        # The state of networks.
        mkdir -p /var/lib/cni
        mount -t tmpfs none /var/lib/cni
        # crun does not accept both versions of control groups side by side.
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
    """Remove the control groups of an engine; they are busy until its last process has ended."""

    def are_gone() -> bool:
        for found in Path("/sys/fs/cgroup").glob(f"*/{name}"):
            for folder, _, _ in os.walk(found, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)
        return not list(Path("/sys/fs/cgroup").glob(f"*/{name}"))

    wait_until(are_gone)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for an engine. Its path is short, because it will contain sockets."""
    with tempfile.TemporaryDirectory(prefix="dsmq-") as path:
        yield Path(path)


@contextmanager
def podman() -> Iterator[Podman]:
    """Podman with the base image; skips if that is not possible."""
    _need(("podman", "podman"), ("ip", "iproute2"), ("nsenter", "util-linux"))
    with _folder() as folder, closing(Podman(folder)) as engine:
        provide_base(engine)
        yield engine


@contextmanager
def docker(base: Podman) -> Iterator[Docker]:
    """Docker with podman's base image; skips if that is not possible."""
    _need(("dockerd", "docker.io"))
    with _folder() as folder, closing(Docker(folder)) as engine:
        wait_until(engine.is_there)
        for image in PACKAGES:
            _copy(base, engine, image)
        yield engine


def _copy(base: Podman, engine: Docker, image: str) -> None:
    """Copy an image from podman to Docker."""
    archive = engine.folder / "image.tar"
    base("save", "--quiet", "--format=docker-archive", f"--output={archive}", image)
    loaded = engine("load", f"--input={archive}").stdout
    archive.unlink()
    engine("tag", loaded.partition(":")[2].strip(), image)


def _need(*programs: tuple[str, str]) -> None:
    if os.geteuid():
        pytest.skip("these tests need root")
    for name, package in programs:
        tool(name, package)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


# Images


def provide_base(engine: Podman) -> None:
    """Provide the base images: from the registry, or else made from Debian packages and cached."""
    if all(engine("pull", "--quiet", image, check=False, online=True).returncode == 0 for image in PACKAGES):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmq-tests"
    cache.mkdir(parents=True, exist_ok=True)
    for image, packages in PACKAGES.items():
        archive = cache / f"{SUITE}-{image.replace(':', '')}.tar"
        if not archive.exists():
            _make_root(archive, packages)
        engine("import", "--change=ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", str(archive), image)


def provide_nats(base: Podman, engine: Docker, image: str) -> None:
    """Provide an image of NATS: from the registry, or else one from packages, with the programs that are used in it."""
    if base("pull", "--quiet", image, check=False, online=True).returncode == 0:
        _copy(base, engine, image)
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy2(binary(), folder)
        # Alpine's wget, for the health check.
        shutil.copy2(tool("busybox", "busybox-static"), Path(folder, "wget"))
        Path(folder, "Dockerfile").write_text(
            'FROM scratch\nENV PATH=/bin\nCOPY nats-server wget /bin/\nENTRYPOINT ["nats-server"]\n'
        )
        engine("build", "--quiet", f"--tag={image}", folder)


def _make_root(archive: Path, packages: str) -> None:
    unfinished = archive.with_suffix(".unfinished.tar")
    # The packages are unpacked but not configured, which takes a third of the time, and is enough for Python. pip needs
    # certificates.
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
    """Return the mirror from which this machine gets its packages, if it can be found."""
    for file in [*sorted(Path("/etc/apt/sources.list.d").glob("*.sources")), Path("/etc/apt/sources.list")]:
        if file.exists() and (
            found := re.search(r"^(?:URIs:|deb(?: \[.*?\])?) *(http\S+)", file.read_text(), re.MULTILINE)
        ):
            return [found[1]]
    return []


def fetch_wheels(folder: Path) -> None:
    """Download the packages that the build installs, by hash."""
    files = [word for file in LOCKED for word in ("--requirement", str(file))]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"),
            *("--only-binary=:all:", f"--python-version={PYTHON}", f"--dest={folder}", *files),
        ],
        check=True,
        timeout=300,
    )
    (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /fetched\n")


def build(engine: Engine, wheels: Path) -> None:
    """Build the image from the Dockerfile, without a network."""
    if isinstance(engine, Docker):
        # Docker mounts no folders into a build, so the packages must be in the base image.
        (wheels / "Dockerfile").write_text(f"FROM {BUILD_BASE}\nCOPY . /fetched\nCOPY pip.conf /etc/pip.conf\n")
        engine("build", "--quiet", f"--tag={BUILD_BASE}", str(wheels))
    engine("build", *offline(engine, wheels), f"--tag={IMAGE}", str(ROOT))


def offline(engine: Engine, wheels: Path) -> list[str]:
    """Return the options of a build that installs packages from `wheels`."""
    if isinstance(engine, Docker):
        return ["--quiet", "--network=none"]
    # Without this format, HEALTHCHECK is ignored.
    return [
        *("--quiet", "--pull=never", "--network=none", "--format=docker"),
        *(f"--volume={wheels}:/fetched:ro", f"--volume={wheels / 'pip.conf'}:/etc/pip.conf:ro"),
    ]


# Containers


@dataclass
class Container:
    """A running or stopped container."""

    engine: Podman | Docker
    id: str

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.engine.inspect("container", self.id)["State"])

    def port(self, inside: int = 30008) -> int:
        """Return the host port of one of the container's ports."""
        return int(self.engine("port", self.id, str(inside)).stdout.rpartition(":")[2])

    def logs(self) -> tuple[str, str]:
        """Return its output on stdout and on stderr."""
        done = self.engine("logs", self.id)
        return done.stdout, done.stderr

    def is_serving(self) -> bool:
        return "listening on" in "".join(self.logs()) or not self.state["Running"]

    def check_health(self) -> str:
        """Return the container's health: starting, healthy, or unhealthy."""
        self.engine.healthcheck(self.id)
        return str(self.state["Health"]["Status"])
