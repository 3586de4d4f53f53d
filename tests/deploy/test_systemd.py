"""dsmq as a systemd service: installed, upgraded and removed by the commands of the README."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from box import SUITES, Box, NotHere, Tree, boot, why_not

from conftest import ROOT, SOON
from engine import binary

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(150),
]

UNITS = ("dsmq.service", "dsmq.socket", "dsmq-http.socket")
PYTHON = "/opt/dsmq/bin/python"
TOKEN = "/etc/dsmq/token"
# The beginning of all scripts that run in the box.
PRELUDE = f"""
import os, socket, sys, time, urllib.request
from dsmq.client import connect
from dsmq.errors import ConnectionLost
token = open("{TOKEN}").readline().strip()
def say(*words):
    print(*words, flush=True)
def wire(message=b"PING"):
    sock = socket.create_connection(("127.0.0.1", 30008), timeout=30)
    sock.sendall(b"AUTH " + token.encode() + b"\\r\\n" + message + b"\\r\\n")
    return sock
"""
# `dsmq serve`, in which an I/O worker hangs after SIGUSR1.
STALLS = """
import signal, sys, threading
from dsmq.__main__ import main
from dsmq.broker import event_loop as worker
turn, stalled = worker.EventLoop._turn, threading.Event()
def faulty(self):
    if stalled.is_set():
        threading.Event().wait()
    turn(self)
worker.EventLoop._turn = faulty
signal.signal(signal.SIGUSR1, lambda *_: stalled.set())
sys.argv[1:] = ["serve"]
sys.exit(main())
"""
# `dsmq serve`, which starts only once a file exists.
HELD = """
import os, sys, time
from dsmq.__main__ import main
while not os.path.exists("/var/lib/dsmq/go"):
    time.sleep(0.05)
sys.argv[1:] = ["serve"]
sys.exit(main())
"""
# What an attacker who controls the process might try.
PROBE = """
import ctypes, errno, json, mmap, os, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
def run_own():
    with open("own", "w") as file:
        file.write("#!/bin/sh\\n")
    os.chmod("own", 0o700)
    subprocess.run(["./own"], check=True)
tries = {
    "write to /etc": lambda: open("/etc/probe", "w"),
    "write to /usr": lambda: open("/usr/probe", "w"),
    "write to its own code": lambda: open("/opt/dsmq/probe", "w"),
    "write to its state": lambda: open("probe", "w"),
    "read root's token": lambda: open("/etc/dsmq/token"),
    "list /root": lambda: os.listdir("/root"),
    "run a file that it has written": run_own,
    "use IPv4": lambda: socket.socket(socket.AF_INET),
    "use IPv6": lambda: socket.socket(socket.AF_INET6),
    "use netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "use raw packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "use Unix sockets": lambda: socket.socket(socket.AF_UNIX),
    "map memory that is writable and executable": lambda: mmap.mmap(-1, 4096, prot=7),
    "create a mount namespace": lambda: call("unshare", 0x20000),
    "set the host name": lambda: call("sethostname", b"probe", 5),
    "mount": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
    "create a device": lambda: os.mknod("device", 0o20600, os.makedev(1, 1)),
    "create a setuid file": lambda: os.chmod("probe", 0o4700),
    "read the kernel log": lambda: open("/dev/kmsg"),
    "see other processes": lambda: os.stat("/proc/1"),
    "read system information": lambda: open("/proc/meminfo"),
    "raise its priority": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    # Last, because afterwards the process is no longer root.
    "create a user namespace": lambda: call("unshare", 0x10000000),
}
found = {}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
with open("found.json", "w") as file:
    json.dump(found, file)
"""
# The service itself needs these.
ALLOWED = {"write to its state", "use Unix sockets"}

# Even root may not do these in a container.
NOT_EVEN_ROOT = {"create a device", "read the kernel log", "raise its priority"}


# The box


@pytest.fixture(scope="module")
def trees() -> Iterator[dict[str, Tree]]:
    """The Debian trees. They are made in parallel, while the tests in the first one run."""
    if reason := why_not():
        pytest.skip(reason)
    trees = {suite: Tree(suite) for suite in SUITES}
    yield trees
    for tree in trees.values():
        tree.abandon()


@pytest.fixture(scope="module", params=SUITES)
def box(
    request: pytest.FixtureRequest, trees: dict[str, Tree], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A box with dsmq installed."""
    try:
        tree = trees[request.param].wait()
    except NotHere as reason:
        pytest.skip(str(reason))
    with boot(tree) as box:
        provide(box, tmp_path_factory.mktemp("packages"))
        box.shell(source() + documented("python3 -m venv"))
        box.write("/etc/dsmq/held.py", HELD)
        box.write("/etc/dsmq/stalls.py", STALLS)
        box.write("/etc/dsmq/probe.py", PROBE)
        yield box


def provide(box: Box, packages: Path) -> None:
    """Copy a checkout there, and the packages that pip would download for the box's Python."""
    version = box.run("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    wanted = re.findall(r'^    "(.*)",$', re.search(r"^dependencies = \[\n(.*?)^\]", _project(), re.M | re.S)[1], re.M)  # type: ignore[index]
    build = re.search(r'^requires = \["(.*)"\]', _project(), re.M)
    assert build
    platforms = [
        f"--platform={name}_{platform.machine()}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    ]
    fetched = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", f"--dest={packages}", "--only-binary=:all:"),
            *(f"--python-version={version}", "--implementation=cp", *platforms, *wanted, "nats-py", build[1]),
        ],
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if fetched.returncode:
        pytest.skip("pip can fetch no packages for the box, see above")
    shutil.copytree(packages, box.root / "source" / "packages")
    for name in ("src", "deploy"):
        shutil.copytree(ROOT / name, box.root / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "dsmq.toml.example"):
        shutil.copy(ROOT / name, box.root / "source")


def _project() -> str:
    return (ROOT / "pyproject.toml").read_text()


def source() -> str:
    """Return the first lines of a script that runs in the checkout, without a network for pip."""
    return "cd /source; export PIP_NO_INDEX=1 PIP_FIND_LINKS=/source/packages\n"


def documented(beginning: str) -> str:
    """Return the block of commands in one of the READMEs that begins with this."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "deploy/README.md"))
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    (block,) = [block for block in blocks if block.startswith(beginning) and "/opt/dsmq" in block]
    return str(block)


@contextmanager
def drop_in(box: Box, text: str, unit: str = "dsmq.service") -> Iterator[None]:
    """Run with a drop-in for the unit. The service is stopped before and after."""
    path = f"/etc/systemd/system/{unit}.d/test.conf"
    box.write(path, text)
    stop(box)
    try:
        yield
    finally:
        box.shell(f"rm {path}; rmdir --ignore-fail-on-non-empty {path.rpartition('/')[0]}")
        stop(box)


def stop(box: Box) -> None:
    """Stop the service and delete its state."""
    units = " ".join(UNITS)
    # Without reset-failed, the tests would exceed systemd's limit on starts.
    box.shell(
        f"systemctl daemon-reload; systemctl stop {units}; systemctl reset-failed {units}; "
        "systemctl clean --what=state dsmq.service; systemctl start dsmq.socket"
    )


def shipped(name: str) -> str:
    return (ROOT / "deploy" / "systemd" / name).read_text()


@contextmanager
def configured(box: Box, text: str) -> Iterator[None]:
    """Replace the configuration file for a while. The test itself has to reload it."""
    before = (box.root / "etc/dsmq/dsmq.toml").read_text()
    box.write("/etc/dsmq/dsmq.toml", text)
    try:
        yield
    finally:
        box.write("/etc/dsmq/dsmq.toml", before)


def python(box: Box, script: str) -> str:
    """Run a script with the installed client, in the box but outside the service."""
    return box.run(PYTHON, "-c", PRELUDE + script)


@contextmanager
def beside(box: Box, script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script in the background; the block begins once it has printed a line."""
    with box.popen(PYTHON, "-c", PRELUDE + script) as process:
        try:
            assert process.stdout
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    """Let such a script continue and return the next line that it prints."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def scrape(box: Box) -> str:
    return python(box, 'print(urllib.request.urlopen("http://127.0.0.1:30009/metrics", timeout=10).read().decode())')


def metric(box: Box, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", scrape(box), re.M)
    assert found, name
    return float(found[1])


class Journal:
    """The log of the service from now on."""

    def __init__(self, box: Box) -> None:
        self._box = box
        box.run("journalctl", "--sync")
        shown = box.run("journalctl", "--lines=0", "--show-cursor", "--quiet")
        self._cursor = shown.removeprefix("-- cursor: ")

    def entries(self) -> list[dict[str, str]]:
        self._box.run("journalctl", "--sync")
        lines = self._box.run("journalctl", "--unit=dsmq.service", "--output=json", f"--after-cursor={self._cursor}")
        return [json.loads(line) for line in lines.splitlines()]

    def priority(self, pattern: str) -> int:
        """Wait for a line of the service that matches; return its priority."""

        def found() -> list[str]:
            mine = [one for one in self.entries() if one.get("SYSLOG_IDENTIFIER") == "dsmq"]
            return [one["PRIORITY"] for one in mine if re.match(pattern, one["MESSAGE"])]

        return int(wait_for(found)[0])


def wait_for(look: Callable[[], list[str]]) -> list[str]:
    """Poll until the result is not empty and return it."""
    until = time.monotonic() + SOON
    while not (found := look()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def restarts(box: Box) -> int:
    return int(box.show("dsmq.service", "NRestarts"))


def await_restart(box: Box, before: int) -> None:
    """Wait until the service has been restarted and serves."""
    wait_for(lambda: ["yes"] if restarts(box) > before and box.show("dsmq.service", "ActiveState") == "active" else [])


def listening_inodes(box: Box) -> set[str]:
    """Return the inodes of the sockets that listen on dsmq's ports."""
    lines = [line.split() for line in box.run("cat", "/proc/net/tcp").splitlines()]
    ports = {f"0100007F:{port:04X}" for port in (30008, 30009)}
    return {fields[9] for fields in lines if fields[1] in ports and fields[3] == "0A"}


def reloads(box: Box) -> list[str]:
    """Return the drop-ins to test a reload with: none, and the shipped one if this systemd supports it."""
    version = int(box.run("systemctl", "--version").split()[1])
    return ["[Service]\n", *([shipped("notify-reload.conf")] if version >= 253 else [])]


# Installed


def test_first_client_activates_service(box: Box) -> None:
    stop(box)
    assert box.try_run("systemctl", "is-active", *UNITS).stdout.split() == ["inactive", "active", "active"]
    put_and_get = """
with connect(token=token) as mq:
    mq.put("greetings", "hello world!")
    say(mq.get_wait("greetings"))
"""
    assert python(box, put_and_get) == "hello world!"
    assert box.try_run("systemctl", "is-active", *UNITS).stdout.split() == ["active"] * 3
    assert box.run("systemctl", "is-enabled", "dsmq.socket") == "enabled"


def test_prometheus_finds_metrics(box: Box) -> None:
    shown = scrape(box)
    assert "dsmq_healthy 1.0" in shown
    # Its sandbox hides parts of /proc that Prometheus's client reads.
    began = re.search(r"^process_start_time_seconds (\S+)$", shown, re.M)
    assert began
    assert abs(float(began[1]) - time.time()) < 300


def test_status_shows_connections_and_messages(box: Box) -> None:
    stop(box)
    script = 'with connect(token=token) as mq:\n mq.put("a", "b"); say("ready"); sys.stdin.readline(); say("done")'
    with beside(box, script) as client:
        wait_for(lambda: re.findall("^1 connections, 1 messages$", box.show("dsmq.service", "StatusText")))
        assert answer(client) == "done"


def test_unit_is_active_only_once_serving(box: Box) -> None:
    with drop_in(box, f"[Service]\nExecStart=\nExecStart={PYTHON} /etc/dsmq/held.py\n"):
        box.run("systemctl", "start", "--no-block", "dsmq.service")
        wait_for(lambda: [box.show("dsmq.service", "MainPID")] if (box.root / "var/lib/dsmq").exists() else [])
        # systemd reports that it runs and listens.
        assert box.try_run("systemctl", "is-active", "dsmq.service").stdout.strip() == "activating"
        box.run("touch", "/var/lib/dsmq/go")
        box.run("systemctl", "start", "dsmq.service")
        assert box.run("systemctl", "is-active", "dsmq.service") == "active"
        assert python(box, "say(wire().recv(5))") == "b'+OK\\r\\n'"
        box.run("rm", "/var/lib/dsmq/go")


def test_units_pass_verification(box: Box) -> None:
    shown = box.try_run("systemd-analyze", "verify", *(f"/etc/systemd/system/{unit}" for unit in UNITS))
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    exposure = box.run("systemd-analyze", "security", "--no-pager", "--threshold=4", "dsmq.service").splitlines()[-1]
    print(exposure)
    assert float(exposure.partition(": ")[2].split()[0]) <= 0.4


@pytest.mark.parametrize("name", ["notify-reload", "without-socket", "tls", "secrets-by-group"])
def test_drop_ins_pass_verification(box: Box, name: str) -> None:
    with drop_in(box, shipped(f"{name}.conf")):
        shown = box.try_run("systemd-analyze", "verify", "/etc/systemd/system/dsmq.service")
        lines = (shown.stdout + shown.stderr).splitlines()
        exposure = box.run("systemd-analyze", "security", "--no-pager", "dsmq.service").splitlines()[-1]
        print(name, exposure)
    if name == "notify-reload" and len(reloads(box)) == 1:
        assert "notify-reload" in lines[0]
        return
    assert not lines


# At work


def test_reload_keeps_connections(box: Box) -> None:
    script = """
mq = connect(token=token)
number = mq.put("a", "before")
say("ready")
while sys.stdin.readline():
    mq.seek("a", number - 1)
    say(mq.get("a"), mq.get("a") or "nothing")
"""
    for change in reloads(box):
        with (
            drop_in(box, change),
            beside(box, script) as client,
            configured(box, 'max_age_seconds = 60\nlog_level = "debug"\n'),
        ):
            opened = metric(box, "dsmq_connections_opened_total")
            assert metric(box, "dsmq_max_age_seconds") == 600
            journal = Journal(box)
            box.run("systemctl", "reload", "dsmq.service")
            if "notify-reload" not in change:
                journal.priority("configuration reloaded")
            # Now the new configuration must be in effect.
            assert metric(box, "dsmq_max_age_seconds") == 60
            assert answer(client) == "before nothing"
            assert metric(box, "dsmq_connections_opened_total") == opened
            assert journal.priority("configuration reloaded; changed: max_age_seconds, log_level$") == 6
            assert journal.priority("HTTP: ") == 7
            box.write("/etc/dsmq/dsmq.toml", 'max_age_seconds = 60\nlog_level = "debug"\nlisten_backlog = 7\n')
            box.run("systemctl", "reload", "dsmq.service")
            assert journal.priority("restart required to apply: listen_backlog$") == 4
            box.write("/etc/dsmq/dsmq.toml", "max_age_seconds = true")
            box.run("systemctl", "reload", "dsmq.service")
            assert journal.priority("reload failed: /etc/dsmq/dsmq.toml: max_age_seconds: ") == 3
            assert metric(box, "dsmq_max_age_seconds") == 60
            assert answer(client) == "before nothing"
            wait_for(lambda: re.findall("^active$", box.show("dsmq.service", "ActiveState")))


def test_kill_refuses_no_client(box: Box) -> None:
    box.run("systemctl", "start", "dsmq.service")
    script = """
import threading
over, counted = threading.Event(), [0, 0]
def knock():
    while not over.is_set():
        try:
            wire().close()
            counted[0] += 1
        except ConnectionRefusedError:
            counted[1] += 1
        time.sleep(0.01)
threading.Thread(target=knock, daemon=True).start()
mq = connect(token=token)
say("ready")
sys.stdin.readline()
try:
    mq.put("a", "lost with its connection")
except ConnectionLost:
    mq.put("a", "over another one")
over.set()
say(counted[0] > 10, counted[1])
"""
    before, sockets = restarts(box), listening_inodes(box)
    assert len(sockets) == 2
    with beside(box, script) as client:
        box.run("systemctl", "kill", "--signal=KILL", "dsmq.service")
        assert answer(client) == "True 0"
    await_restart(box, before)
    assert listening_inodes(box) == sockets


def test_watchdog_restarts_stalled_worker(box: Box) -> None:
    change = f"""
[Service]
ExecStart=
ExecStart={PYTHON} /etc/dsmq/stalls.py
Environment=DSMQ_HEALTH_TIMEOUT_SECONDS=1
WatchdogSec=3
"""
    with drop_in(box, change):
        box.run("systemctl", "start", "dsmq.service")
        journal, before = Journal(box), restarts(box)
        box.run("systemctl", "kill", "--signal=USR1", "dsmq.service")
        await_restart(box, before)
        assert [one for one in journal.entries() if "Watchdog timeout (limit 3s)!" in one["MESSAGE"]]
        assert python(box, "say(wire().recv(5))") == "b'+OK\\r\\n'"


def test_stop_with_many_readers_succeeds(box: Box) -> None:
    box.run("systemctl", "restart", "dsmq.service")
    script = """
readers = [wire(b"GETWAIT nothing 600000") for _ in range(50)]
say("ready")
sys.stdin.readline()
def ended(sock):
    while data := sock.recv(1000):
        pass
    return True
say(sum(ended(sock) for sock in readers))
"""
    with beside(box, script) as clients:
        wait_for(lambda: ["all wait"] if metric(box, "dsmq_waiting_readers") == 50 else [])
        began = time.monotonic()
        box.run("systemctl", "stop", "dsmq.socket", "dsmq.service")
        assert time.monotonic() - began < 10
        assert answer(clients) == "50"
    assert [box.show("dsmq.service", name) for name in ("Result", "ExecMainStatus", "ActiveState")] == [
        *("success", "0", "inactive"),
    ]


def test_stop_gets_requested_time(box: Box) -> None:
    change = "[Service]\nTimeoutStopSec=1\nEnvironment=DSMQ_STOP_TIMEOUT_SECONDS=3\n"
    # A client that does not read replies, of which there are more than the kernel buffers.
    script = """
with connect(token=token) as mq:
    mq.put_many("long", [b"x" * 1_000_000] * 20)
sock = wire(b"\\r\\n".join([b"READ long 0"] * 20))
say(sock.recv(5))
sys.stdin.readline()
"""
    with drop_in(box, change), beside(box, script):
        wait_for(lambda: ["yes"] if metric(box, "dsmq_sent_bytes_total") > 10_000 else [])
        began = time.monotonic()
        box.run("systemctl", "stop", "dsmq.socket", "dsmq.service")
        assert 2 < time.monotonic() - began < 10
        assert box.show("dsmq.service", "Result") == "success"


def test_other_socket_units_work(box: Box) -> None:
    with drop_in(box, "[Socket]\nListenStream=[::1]:30008\nListenStream=/run/dsmq-test.sock\n", "dsmq.socket"):
        script = """
for family, address in (socket.AF_INET6, ("::1", 30008)), (socket.AF_UNIX, "/run/dsmq-test.sock"):
    with socket.socket(family) as sock:
        sock.connect(address)
        sock.sendall(b"AUTH " + token.encode() + b"\\r\\n")
        say(sock.recv(5))
"""
        assert python(box, script).split() == ["b'+OK\\r\\n'"] * 2
        box.run("systemctl", "restart", "dsmq.service")
        assert python(box, script).split() == ["b'+OK\\r\\n'"] * 2


# Secrets


def ping(box: Box, token: str) -> tuple[int, str]:
    done = box.try_run("env", f"DSMQ_AUTH_TOKEN={token}", "/opt/dsmq/bin/dsmq", "ping")
    return done.returncode, done.stderr.strip()


def test_token_is_a_credential(box: Box) -> None:
    stop(box)
    journal = Journal(box)
    right = box.run("cat", TOKEN)
    assert len(right) > 32
    assert ping(box, right) == (0, "")
    assert ping(box, "wrong-token-wrong-token") == (1, "dsmq: invalid token")
    assert journal.priority(r"client \d+ .*: invalid token") == 4
    assert ping(box, "")[0] == 1
    assert box.run("stat", "--format=%a %U", TOKEN) == "600 root"
    user = box.run("stat", "--format=%U", "/var/lib/dsmq/")
    assert box.try_run("runuser", "-u", user, "--", "cat", TOKEN).returncode
    # It is neither in the command line nor in the environment.
    process = box.show("dsmq.service", "MainPID")
    seen = box.run("cat", f"/proc/{process}/environ", f"/proc/{process}/cmdline")
    assert right not in seen
    assert "SHUTDOWN" in python(box, 'sock = wire(b"SHUTDOWN"); sock.recv(5); say(sock.recv(200))')
    assert box.run("systemctl", "is-active", "dsmq.service") == "active"


def test_tls_files_are_credentials(box: Box) -> None:
    box.shell(
        "install -d /etc/dsmq/tls; cd /etc/dsmq/tls; umask 077; openssl req -x509 -newkey ec -nodes -days 2 "
        "-pkeyopt ec_paramgen_curve:prime256v1 -keyout key.pem -out cert.pem -subj /CN=dsmq "
        "-addext subjectAltName=IP:127.0.0.1"
    )
    with drop_in(box, shipped("tls.conf")):
        script = """
with connect(token=token, ca_file="/etc/dsmq/tls/cert.pem") as mq:
    mq.put("a", "b")
    say(mq.get("a"))
"""
        assert python(box, script) == "b"


def test_reload_changes_tokens_of_a_group(box: Box) -> None:
    old = box.run("cat", TOKEN)
    comments = re.findall(r"^#   (.*)$", shipped("secrets-by-group.conf"), re.M)
    assert len(comments) == 2
    box.shell("\n".join(comments))
    try:
        with drop_in(box, shipped("secrets-by-group.conf")):
            assert ping(box, old) == (0, "")
            python(box, 'with connect(token=token) as mq:\n mq.put("a", "kept")')
            journal = Journal(box)
            box.write(TOKEN, "another-token-another-token-another\n")
            box.run("systemctl", "reload", "dsmq.service")
            journal.priority("configuration reloaded")
            assert ping(box, old)[0] == 1
            script = 'with connect(token=token) as mq:\n mq.seek("a", 0)\n say(mq.get("a"))'
            assert python(box, script) == "kept"
    finally:
        box.write(TOKEN, old + "\n")
        box.shell(f"chgrp root {TOKEN}; chmod 600 {TOKEN}; groupdel dsmq-secrets")


# The sandbox


def test_sandbox_forbids_what_the_service_does_not_need(box: Box) -> None:
    change = f"[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\nExecStart={PYTHON} /etc/dsmq/probe.py\n"
    with drop_in(box, change):
        box.run("systemctl", "start", "dsmq.service")
        found = json.loads(box.run("cat", "/var/lib/dsmq/found.json"))
        print(found)
    assert {name for name, how in found.items() if how == "done"} == ALLOWED
    # Outside the sandbox, root may do nearly all of these.
    box.shell("mkdir /tmp/probe; cd /tmp/probe; python3 /etc/dsmq/probe.py; rm /etc/probe /usr/probe /opt/dsmq/probe")
    free = json.loads(box.run("cat", "/tmp/probe/found.json"))
    print(free)
    assert {name for name, how in free.items() if how != "done"} <= NOT_EVEN_ROOT
    box.shell("hostname box; umount /mnt 2>/dev/null || true; rm -rf /tmp/probe")


def test_service_without_socket_units_has_network(box: Box) -> None:
    stop(box)
    away = "mv /etc/systemd/system/dsmq.socket /etc/systemd/system/dsmq-http.socket"
    box.shell(f"systemctl stop {' '.join(UNITS)}; mkdir /away; {away} /away; systemctl daemon-reload")
    try:
        box.write("/etc/systemd/system/dsmq.service.d/test.conf", shipped("without-socket.conf"))
        box.run("systemctl", "daemon-reload")
        with configured(box, "port = 31008\nhttp_port = 31009\n"):
            box.run("systemctl", "start", "dsmq.service")
            assert ping(box, box.run("cat", TOKEN))[0] == 1
            done = box.try_run("/opt/dsmq/bin/dsmq", "ping", "--port=31008", f"--token-file={TOKEN}")
            assert done.returncode == 0, done.stderr
            box.run("systemctl", "stop", "dsmq.service")
            # Without the drop-in it does not start, rather than being unreachable.
            box.shell("rm /etc/systemd/system/dsmq.service.d/test.conf; systemctl daemon-reload")
            journal = Journal(box)
            assert box.try_run("systemctl", "start", "dsmq.service").returncode
            assert journal.priority(r"dsmq: cannot listen on 127\.0\.0\.1:3100[89]: Address family not supported")
            box.run("systemctl", "stop", "dsmq.service")
    finally:
        box.shell("mv /away/* /etc/systemd/system/; rmdir /away; rm -f /etc/systemd/system/dsmq.service.d/test.conf")
        stop(box)


# In front of NATS


def test_service_stores_messages_in_nats(box: Box) -> None:
    stop(box)
    token = box.run("cat", TOKEN)
    away = "mv /etc/systemd/system/dsmq.socket /etc/systemd/system/dsmq-http.socket"
    box.shell(f"systemctl stop {' '.join(UNITS)}; mkdir /away; {away} /away; systemctl daemon-reload")
    try:
        box.shell(source() + "/opt/dsmq/bin/pip install --quiet '.[nats]'")
        shutil.copy2(binary(), box.root / "usr/local/bin/nats-server")
        box.shell("echo 127.0.0.1 nats-1 >>/etc/hosts; /source/deploy/cluster/secrets.sh nats-1")
        # One node instead of three.
        cluster = box.root / "source/deploy/cluster"
        for name, pattern, new in (
            ("nats.conf", r"(?ms)^cluster \{.*?^\}\n", ""),
            ("systemd/store.conf", ",nats-2:4222,nats-3:4222", "\nEnvironment=DSMQ_STORE_REPLICAS=1"),
        ):
            text, count = re.subn(pattern, new, (cluster / name).read_text())
            assert count == 1
            (cluster / name).write_text(text)
        (block,) = re.findall(r"(?ms)^```bash\n(useradd .*?)^```", (cluster / "README.md").read_text())
        box.shell("cd /source/deploy/cluster\n" + block)
        assert box.run("cat", TOKEN) == box.run("cat", "/source/deploy/cluster/secrets/dsmq-token")
        python(box, 'with connect(token=token) as mq:\n mq.put("kept", "in NATS")')
        assert box.run("systemctl", "is-active", "nats-server.service", "dsmq.service").split() == ["active"] * 2
        for restart in ("restart dsmq", "kill --signal=KILL nats-server", "reload nats-server", "restart nats-server"):
            box.shell(f"systemctl {restart}")
            script = 'with connect(token=token) as mq:\n mq.put("a", "b")\n mq.seek("kept", 0)\n say(mq.get("kept"))'
            assert python(box, script) == "in NATS"
        user = box.run("stat", "--format=%U", "/etc/nats/node.key", "/var/lib/nats")
        assert user.split() == ["root", "nats"]
    finally:
        box.shell(
            "systemctl disable --now nats-server dsmq; userdel nats; rm -r /etc/nats /var/lib/nats /etc/dsmq/store"
        )
        box.shell("cd /etc/systemd/system; rm -r dsmq.service.d nats-server.service; mv /away/* .; rmdir /away")
        box.shell("systemctl daemon-reload; systemctl enable --now dsmq.socket")
        box.write(TOKEN, token + "\n")
        stop(box)


# Upgraded, removed


READ_FIRST = 'with connect(token=token) as mq:\n mq.seek("kept", 0)\n say(mq.get("kept"))'


def test_messages_survive_restart(box: Box) -> None:
    stop(box)
    python(box, 'with connect(token=token) as mq:\n mq.put("kept", "over a restart")')
    box.run("systemctl", "restart", "dsmq.service")
    assert python(box, READ_FIRST) == "over a restart"
    script = """
states = []
with connect(token=token, on_state_change=states.append) as mq:
    mq.put("kept", "1")
    say("ready")
    sys.stdin.readline()
    mq.put("kept", "2")
    say(f"{mq.get('kept')}{mq.get('kept')} {states}")
"""
    with beside(box, script) as client:
        box.run("systemctl", "restart", "dsmq.service")
        assert answer(client) == "12 ['lost', 'resumed']"


def test_upgrade_refuses_no_client_and_keeps_messages(box: Box) -> None:
    stop(box)
    python(box, 'with connect(token=token) as mq:\n mq.put("kept", "over an upgrade")')
    box.shell("""sed -i 's/^__version__ = .*/__version__ = "99.0"/' /source/src/dsmq/__init__.py""")
    journal = Journal(box)
    sockets = listening_inodes(box)
    box.shell(source() + documented("/opt/dsmq/bin/pip install --upgrade"))
    assert journal.priority("dsmq 99.0 listening on 127.0.0.1:30008 ") == 6
    assert listening_inodes(box) == sockets
    assert ping(box, box.run("cat", TOKEN)) == (0, "")
    assert python(box, READ_FIRST) == "over an upgrade"


def test_removal_leaves_no_file_unit_or_user(box: Box) -> None:
    """Must be the last test, because it removes dsmq."""
    box.shell(documented("systemctl disable --now"))
    assert not listening_inodes(box)
    elsewhere = " ".join(f"-not -path '/{name}/*'" for name in ("source", "proc", "tmp"))
    assert box.shell(f"find / -xdev -name '*dsmq*' {elsewhere}") == ""
    assert box.run("systemctl", "list-units", "--all", "--no-legend", "*dsmq*") == ""
    assert box.try_run("getent", "passwd", "dsmq").returncode
