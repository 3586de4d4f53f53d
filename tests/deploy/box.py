"""A Debian container with systemd as PID 1, run by systemd-nspawn, for the tests of the units.

It has its own network, with loopback only, and writes only to memory. As a program, this module runs one until its
standard input ends: `unshare --mount python box.py TREE`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# These releases have systemd 252 and 257; the tests ask systemctl for the version.
SUITES = ("bookworm", "trixie")
# In addition to the minimum: packages for the documented installation and the units (procps has kill, a .venv needs
# python3-venv), and libbpf for the parts of the sandbox that systemd enforces with BPF.
PACKAGES = "systemd,systemd-sysv,dbus,procps,libbpf1,python3,python3-venv,openssl"
PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
LOOK_SECONDS = 0.05
BOOT_SECONDS = 60.0
HALT_SECONDS = 20.0


class NotHere(Exception):
    """No box can run on this machine; the message says why."""


def why_not() -> str:
    """Return why boxes can't run on this machine; empty if they can."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if missing:
        return f"not installed: Debian's packages {', '.join(sorted(set(missing)))}"
    if os.geteuid():
        return "booting systemd requires root: not allowed here"
    mount = ["unshare", "--mount", "--net", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return "namespaces and mounts are not allowed here"
    return "" if _mirror() else "apt has no source of Debian packages: not allowed here"


def _mirror() -> str:
    """Return the mirror from which this machine gets its Debian packages."""
    sources = Path("/etc/apt")
    for file in (*sources.glob("sources.list.d/*.sources"), *sources.glob("sources.list"), *sources.glob("*.d/*.list")):
        if found := re.search(r"^(?:URIs:|deb(?: \[.*?\])?)\s+(\S+)", file.read_text(), re.MULTILINE):
            return found[1]
    return ""


class Tree:
    """The files of a Debian release. They are cached, because unpacking them takes half a minute or more."""

    def __init__(self, suite: str) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmq-tests"
        self.path = cache / f"{suite}-{zlib.crc32(PACKAGES.encode()):x}"
        self._making: subprocess.Popen[bytes] | None = None
        if not self.path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            self._new = Path(tempfile.mkdtemp(dir=cache))
            self._making = subprocess.Popen(
                ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", suite, self._new, _mirror()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )

    def wait(self) -> Path:
        """Return the path, once the tree is complete. Raises NotHere."""
        if self._making:
            _, said = self._making.communicate()
            failed = self._making.returncode
            self._making = None
            if failed:
                shutil.rmtree(self._new, ignore_errors=True)
                raise NotHere(f"mmdebstrap: {said.decode(errors='replace').strip().rpartition(chr(10))[2]}")
            # If another process was faster, use its tree.
            with contextlib.suppress(OSError):
                self._new.rename(self.path)
            shutil.rmtree(self._new, ignore_errors=True)
        return self.path

    def abandon(self) -> None:
        """Stop creating the tree, unless it was waited for."""
        if self._making:
            self._making.terminate()
            self._making.communicate()
            shutil.rmtree(self._new, ignore_errors=True)


class Box:
    """A running box. Its methods raise what subprocess raises."""

    def __init__(self, leader: int) -> None:
        self._enter = ("nsenter", f"--target={leader}", *NAMESPACES, "--")
        self.root = Path(f"/proc/{leader}/root")
        """The root of its files."""

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """Start a command in it."""
        # Pipes, so that a test can read its output and let it continue with a line of input.
        return subprocess.Popen([*self._enter, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def try_run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in it, which may fail."""
        return subprocess.run(
            [*self._enter, *words], input=stdin, capture_output=True, text=True, timeout=BOOT_SECONDS, check=False
        )

    def run(self, *words: str, stdin: str = "") -> str:
        """Run a command in it and return its output."""
        done = self.try_run(*words, stdin=stdin)
        assert done.returncode == 0, f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def shell(self, script: str) -> str:
        """Run a shell script in it, up to the first command that fails, and return its output."""
        return self.run("sh", "-ec", script)

    def write(self, path: str, text: str) -> None:
        """Write a file in it."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value")


@contextmanager
def boot(tree: Path) -> Iterator[Box]:
    """Boot a box on these files, which are not changed."""
    keeper = subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", sys.executable, __file__, tree],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert keeper.stdin
    assert keeper.stdout
    try:
        line = keeper.stdout.readline()
        assert line, "no box: see above"
        yield Box(int(line))
    finally:
        # Everything started in the box ends with it.
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()


# The process that runs it


def _keep(tree: Path) -> None:
    with tempfile.TemporaryDirectory() as work, _cgroup() as group:
        root = _overlay(tree, Path(work))
        log = Path(work, "log")
        with log.open("w") as output:
            nspawn = subprocess.Popen(_nspawn(root, group), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        leader = None
        try:
            leader = _await_boot(nspawn)
            print(leader or "", end="\n" if leader else "", flush=True)
            if leader:
                sys.stdin.read()
            else:
                sys.stderr.write(log.read_text(errors="replace"))
        finally:
            _halt(nspawn, leader)
            # The upper mount has to go first.
            for mounted in (root, Path(work)):
                subprocess.run(["umount", "--recursive", "--lazy", mounted], check=False)


@contextmanager
def _cgroup() -> Iterator[Path]:
    """A cgroup (version 2) in which systemd creates its own."""
    top = Path("/sys/fs/cgroup")
    if not (top / "cgroup.procs").exists():
        # The machine has both versions. In this process's namespace, mount only version 2.
        subprocess.run(["umount", "--recursive", top], check=True)
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", top], check=True)
    group = top / f"dsmq-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        until = time.monotonic() + HALT_SECONDS
        while group.exists() and time.monotonic() < until:
            for below, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(below)
            time.sleep(LOOK_SECONDS)


def _overlay(tree: Path, work: Path) -> Path:
    """Mount the tree with an overlay in memory for changed files; return the root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", work], check=True)
    for name in ("upper", "work", "root"):
        (work / name).mkdir()
    layers = f"lowerdir={tree},upperdir={work}/upper,workdir={work}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, work / "root"], check=True)
    return work / "root"


def _nspawn(root: Path, group: Path) -> list[str]:
    return [
        *("sh", "-c", 'echo $$ >"$0/cgroup.procs"; exec "$@"', str(group)),
        *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}", f"--machine=dsmq-test-{os.getpid()}"),
        # This machine may not run systemd, so the container can't be registered with it.
        *("--register=no", "--keep-unit", "--private-network", "--link-journal=no", "--console=pipe"),
        *("--resolv-conf=off", "--timezone=off"),
        # Its systemd enforces parts of the sandbox with BPF and silently skips them if BPF is not available.
        *("--capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON", "--system-call-filter=bpf"),
    ]


def _await_boot(nspawn: subprocess.Popen[bytes]) -> int | None:
    """Wait until it has booted; return the PID of its PID 1 outside, or None if it does not boot."""
    until = time.monotonic() + BOOT_SECONDS
    while nspawn.poll() is None and time.monotonic() < until:
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
        for leader in children[:1]:
            box = Box(int(leader))
            if box.try_run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"):
                return int(leader)
        time.sleep(LOOK_SECONDS)
    return None


def _halt(nspawn: subprocess.Popen[bytes], leader: int | None) -> None:
    if nspawn.poll() is None and leader:
        # The signal of `systemctl halt`.
        os.kill(leader, signal.SIGRTMIN + 3)
        with contextlib.suppress(subprocess.TimeoutExpired):
            nspawn.wait(HALT_SECONDS)
    if nspawn.poll() is None:
        nspawn.kill()
    nspawn.wait()


if __name__ == "__main__":
    # The tests handle Ctrl-C and then close the standard input of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"] = "1"
    _keep(Path(sys.argv[1]))
