"""Dockerfile and deploy/docker: built and run by a real engine, as described in the README."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import container_engine as engines
import pytest
import trustme
import yaml
from container_engine import BASE, IMAGE, LOCKED, LOCKED_DOWN, Container, Docker, Podman
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import ROOT, SOON, tool, wait_until
from dsmq.broker.auth import HTTPAuthenticator
from dsmq.client import DSMQClientSideConnection, connect
from dsmq.errors import DSMQError
from dsmq.wire.addresses import host_names

HERE = ROOT / "deploy/docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOKEN = "a-token-for-the-tests"
MEGABYTE = 1_000_000

# The first test of a session waits for the image.
pytestmark = [
    pytest.mark.deploy,
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages that the build installs."""
    folder = tmp_path_factory.mktemp("wheels")
    engines.fetch_wheels(folder)
    return folder


@pytest.fixture(scope="session")
def podman(wheels: Path) -> Iterator[Podman]:
    with engines.podman() as engine:
        engines.build(engine, wheels)
        yield engine


@pytest.fixture(scope="session")
def docker(podman: Podman, wheels: Path) -> Iterator[Docker]:
    with engines.docker(podman) as engine:
        engines.build(engine, wheels)
        yield engine


@pytest.fixture(params=["podman", "docker"])
def engine(request: pytest.FixtureRequest) -> Podman | Docker:
    """Each engine."""
    found: Podman | Docker = request.getfixturevalue(request.param)
    return found


@contextmanager
def started(engine: Podman | Docker, *options: str) -> Iterator[Container]:
    """Run a container on free ports, without privileges, once it serves."""
    words = ["--publish=127.0.0.1::30008", "--publish=127.0.0.1::30009", *LOCKED_DOWN]
    words += [*engine.health_options, *options, IMAGE]
    container = Container(engine, engine("run", "--detach", *words).stdout.strip())
    try:
        wait_until(container.is_serving)
        assert container.state["Running"], container.logs()
        yield container
    finally:
        engine(*engine.remove, container.id)


@contextmanager
def client(container: Container, token: str | None = TOKEN, **options: Any) -> Iterator[DSMQClientSideConnection]:
    """Connect a client from the container's host."""
    with (
        container.engine.its_network(),
        connect("127.0.0.1", container.port(), token=token, retry=False, **options) as mq,
    ):
        yield mq


def assert_works(container: Container, **options: Any) -> None:
    with client(container, **options) as mq:
        mq.put("greetings", "hello world!")
        assert mq.get("greetings") == "hello world!"


def fetch(container: Container, path: str, **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{container.port(30009)}{path}", headers=headers)
    with container.engine.its_network(), urllib.request.urlopen(request, timeout=SOON) as answer:
        return str(answer.read().decode())


# The build


def locked(file: Path) -> dict[str, Version]:
    """Return the versions in a file of locked requirements."""
    found = re.findall(
        r"^([\w.-]+)==(\S+) \\\n(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", file.read_text(), re.MULTILINE
    )
    return {name: Version(version) for name, version in found}


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        ("requirements.txt", PROJECT["project"]["optional-dependencies"]["nats"]),
        ("build-requirements.txt", PROJECT["build-system"]["requires"]),
    ],
)
def test_locked_versions_satisfy_requirements(file: str, wanted: list[str]) -> None:
    versions = locked(HERE / file)
    for requirement in map(Requirement, wanted):
        assert versions[requirement.name] in requirement.specifier


@pytest.mark.parametrize("file", LOCKED, ids=lambda file: file.name)
def test_locked_packages_have_hashes_and_no_paths(file: Path) -> None:
    text = file.read_text()
    lines = [line for line in text.split("\n") if line and not line.lstrip().startswith(("#", "--hash=sha256:"))]
    assert len(lines) == len(locked(file)) > 2
    assert re.search(r"://|(^|[\s=])/|localhost", text) is None


def test_image_labels_match_project() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*)"', (ROOT / "Dockerfile").read_text()))
    project = PROJECT["project"]
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "version": project["version"],
        "licenses": project["license"],
    }


def test_wheel_is_reproducible(wheels: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    # The packages for compiling need the image's version of Python.
    backend = ["--no-index", f"--find-links={wheels}", *PROJECT["build-system"]["requires"]]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *backend], check=True)
    made = []
    for number, name in enumerate(("one", "another/place")):
        source = tmp_path / name
        copy_context(source)
        for path in source.rglob("*"):
            # With another date and other permissions.
            path.chmod(0o755 if path.is_dir() else 0o644 if number else 0o600)
            set_time(path, 1_700_000_000 + 1000 * number)
        words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path / str(number)}"]
        subprocess.run([python, "-m", "pip", *words, str(source)], check=True)
        made.append(next((tmp_path / str(number)).glob("dsmq-*.whl")))
    assert made[0].name == made[1].name
    assert made[0].read_bytes() == made[1].read_bytes()


def set_time(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def copy_context(to: Path) -> None:
    """Copy the build context, according to .dockerignore."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        source, target = ROOT / line[1:], to / line[1:]
        if not line.startswith("!"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy2(source, target)
    for name in ("Dockerfile", ".dockerignore"):
        shutil.copy2(ROOT / name, to / name)


# The image


def test_build_context_is_small(podman: Podman, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM scratch\nCOPY . /\n")
    podman("build", "--quiet", "--network=none", f"--file={file}", "--tag=context", str(ROOT))
    assert podman.size("context") < 2 * MEGABYTE


def test_image_is_small(podman: Podman) -> None:
    over = podman.size(IMAGE) - podman.size(BASE)
    assert MEGABYTE < over < 30 * MEGABYTE


def test_image_contains_only_runtime_files(podman: Podman) -> None:
    code = """if True:
        import importlib.metadata, importlib.util, os, sys
        print(*sorted(found.name.lower().replace("_", "-") for found in importlib.metadata.distributions()))
        print(*(where for where, names, _ in os.walk("/opt/dsmq") if "__pycache__" in names))
        sys.argv = ["dsmq", "config"]
        import dsmq.__main__, dsmq.cli.main, dsmq.server, dsmq.wire.tls
        dsmq.__main__.main(["config"])
        caches = {getattr(module, "__cached__", None) for module in list(sys.modules.values())} - {None}
        print(*(path for path in caches if not os.path.exists(path)))
    """
    done = podman("run", "--rm", *LOCKED_DOWN, "--entrypoint=python", IMAGE, "-c", code)
    packages, caches_beside, *_, not_compiled = done.stdout.split("\n")[:-1]
    assert packages.split() == sorted([*locked(LOCKED[0]), "dsmq"])
    assert caches_beside == ""
    assert not_compiled == ""


def test_image_has_compiled_build(engine: Podman | Docker) -> None:
    version = PROJECT["project"]["version"]
    assert engine("run", "--rm", *LOCKED_DOWN, IMAGE, "--version").stdout == f"dsmq {version} (compiled)\n"


def test_image_metadata_shows_how_to_run_it(engine: Podman | Docker) -> None:
    config = engine.inspect("image", IMAGE)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["dsmq"]
    assert config["Cmd"] == ["serve"]
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert set(config["ExposedPorts"]) == {"30008/tcp", "30009/tcp"}
    assert config["Labels"]["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    # Podman stores it elsewhere.
    check = config.get("Healthcheck") or engine.inspect("image", IMAGE)["Healthcheck"]
    assert check["Test"] == ["CMD", "dsmq", "ping"]


# Running the image


@pytest.mark.parametrize("user", ["10001:10001", "4711:4711", "0:0"])
def test_container_runs_as_any_user_without_capabilities(engine: Podman | Docker, user: str) -> None:
    options = [f"--user={user}", f"--env=DSMQ_AUTH_TOKEN={TOKEN}", "--memory=256m", "--pids-limit=64"]
    with started(engine, *options) as container:
        assert_works(container)
        with pytest.raises(DSMQError, match="authentication required"), client(container, token=None) as mq:
            mq.put("greetings", "hello")
        look = "print(open('/proc/1/status').read()); open('/opt/dsmq/x', 'w')"
        done = engine("exec", container.id, "python", "-c", look, check=False)
        assert re.search(r"^CapEff:\s+0+$", done.stdout, re.MULTILINE)
        assert re.search(r"^CapBnd:\s+0+$", done.stdout, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", done.stdout, re.MULTILINE)
        assert re.search(rf"^Uid:\s+{user.partition(':')[0]}\s", done.stdout, re.MULTILINE)
        assert "Read-only file system" in done.stderr
        wait_until(lambda: container.check_health() == "healthy")
        out, err = container.logs()
        assert "listening on" in out
        assert err == ""


def test_container_without_token_does_not_start(podman: Podman) -> None:
    done = podman("run", "--rm", *LOCKED_DOWN, IMAGE, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"dsmq: listening on 0\.0\.0\.0:30008 requires authentication: .*\n", done.stderr)
    assert "DSMQ_AUTH_TOKEN" in done.stderr
    with started(podman, "--env=DSMQ_PROTECTED_MODE=false") as container:
        assert_works(container, token=None)
        wait_until(lambda: container.check_health() == "healthy")


def test_short_token_error_shows_how_to_make_one(podman: Podman) -> None:
    done = podman("run", "--rm", *LOCKED_DOWN, "--env=DSMQ_AUTH_TOKEN=short", IMAGE, check=False)
    assert done.returncode == 2
    make = re.search(r"^dsmq: DSMQ_AUTH_TOKEN: .*: python3 -c '(.*)'\n$", done.stderr)
    assert make is not None
    made = subprocess.run([sys.executable, "-c", make[1]], capture_output=True, text=True, check=True)
    assert len(made.stdout.strip()) >= 32


def test_promtool_accepts_container_metrics(podman: Podman) -> None:
    promtool = tool("promtool", "prometheus")
    with started(podman, f"--env=DSMQ_AUTH_TOKEN={TOKEN}") as container:
        assert_works(container)
        shown = fetch(container, "/metrics")
        assert fetch(container, "/readyz")
    assert re.search(r"^dsmq_puts_total 1\.0$", shown, re.MULTILINE)
    assert f'version="{PROJECT["project"]["version"]}"' in shown
    done = subprocess.run([promtool, "check", "metrics"], input=shown, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_prometheus_scrapes_container_as_in_compose(podman: Podman, tmp_path: Path) -> None:
    with started(podman, f"--env=DSMQ_AUTH_TOKEN={TOKEN}") as container:
        assert_works(container)
        config = (HERE / "prometheus.yml").read_text().replace(": 15s", ": 1s")
        (tmp_path / "prometheus.yml").write_text(config.replace("dsmq:30009", f"127.0.0.1:{container.port(30009)}"))
        shutil.copy(ROOT / "deploy/prometheus/rules.yml", tmp_path)
        words = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with podman.its_network():
            process = subprocess.Popen([tool("prometheus", "prometheus"), *words], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: samples(podman, 'dsmq_puts_total{job="dsmq"}') == ["1"])
            assert samples(podman, 'ALERTS{alertname="DsmqDown"}') == []
        finally:
            process.terminate()
            process.wait(SOON)


def samples(engine: Podman | Docker, expression: str) -> list[str]:
    """Return the samples that Prometheus has scraped, once there are some."""
    url = f"http://127.0.0.1:9090/api/v1/query?query={urllib.parse.quote(expression)}"
    try:
        with engine.its_network(), urllib.request.urlopen(url, timeout=SOON) as answer:
            return [sample["value"][1] for sample in json.load(answer)["data"]["result"]]
    except OSError:
        return []


def test_settings_and_secrets_come_from_files(podman: Podman, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "dsmq.toml").write_text("max_message_bytes = 4711\nport = 30010\nhttp_port = 'off'\n")
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    with started(
        *(podman, "--publish=127.0.0.1::30010"),
        f"--volume={tmp_path / 'dsmq.toml'}:/etc/dsmq/dsmq.toml:ro",
        f"--volume={tmp_path / 'token'}:/run/secrets/dsmq-token:ro",
        f"--volume={tmp_path / 'server.pem'}:/run/secrets/server.pem:ro",
        *("--env=DSMQ_AUTH_TOKEN_FILE=/run/secrets/dsmq-token", "--env=DSMQ_TLS_CERT_FILE=/run/secrets/server.pem"),
    ) as container:
        with podman.its_network():
            security: dict[str, Any] = {"token": TOKEN, "ca_file": str(tmp_path / "ca.pem"), "retry": False}
            with connect("127.0.0.1", container.port(30010), **security) as mq:
                assert mq.max_message_bytes == 4711
        # The health check has found port, token and certificate.
        wait_until(lambda: container.check_health() == "healthy")


def test_health_check_fails_while_server_is_stuck(engine: Podman | Docker) -> None:
    with started(engine, f"--env=DSMQ_AUTH_TOKEN={TOKEN}") as container:
        wait_until(lambda: container.check_health() == "healthy")
        engine("kill", "--signal=STOP", container.id)
        # By default, three in a row must fail, and each waits three seconds for an answer.
        wait_until(lambda: container.check_health() == "unhealthy")
        engine("kill", "--signal=CONT", container.id)
        wait_until(lambda: container.check_health() == "healthy")
        assert_works(container)


def test_stop_is_graceful_with_waiting_clients(engine: Podman | Docker) -> None:
    ended = []

    def wait(mq: DSMQClientSideConnection) -> None:
        try:
            mq.get_wait("nothing", timeout=120)
        except (DSMQError, ConnectionError) as error:
            ended.append(error)

    with started(engine, f"--env=DSMQ_AUTH_TOKEN={TOKEN}") as container, ExitStack() as stack:
        clients = [stack.enter_context(client(container)) for _ in range(20)]
        threads = [threading.Thread(target=wait, args=(mq,)) for mq in clients]
        for thread in threads:
            thread.start()
        wait_until(lambda: "dsmq_waiting_readers 20.0" in fetch(container, "/metrics"))
        began = time.monotonic()
        engine("stop", "--time=15", container.id)
        took = time.monotonic() - began
        assert container.state["ExitCode"] == 0
        assert took < 10
        for thread in threads:
            thread.join(SOON)
        assert len(ended) == 20
        assert "stopped" in container.logs()[0]


def test_killed_container_restarts(engine: Podman | Docker) -> None:
    with started(engine, f"--env=DSMQ_AUTH_TOKEN={TOKEN}", "--restart=unless-stopped") as container:
        before = container.state["Pid"]
        # Don't use the engine's command, after which the container would not be restarted.
        engines.kill(before)
        wait_until(lambda: container.state["Running"] and container.state["Pid"] not in (0, before))
        wait_until(lambda: container.logs()[0].count("listening on") == 2)
        assert_works(container)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--env=DSMQ_MAX_AGE_SECOND=5"], "did you mean DSMQ_MAX_AGE_SECONDS?"),
        (["--env=DSMQ_PORT=70000"], "DSMQ_PORT: "),
        (["--env=DSMQ_CONFIG=/etc/dsmq/other.toml"], "/etc/dsmq/other.toml: No such file"),
        (["--env=DSMQ_AUTH_TOKEN_FILE=/run/secrets/none"], "/run/secrets/none: No such file"),
    ],
)
def test_invalid_setting_is_reported_in_one_line(podman: Podman, options: list[str], said: str) -> None:
    done = podman("run", "--rm", *LOCKED_DOWN, *options, IMAGE, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# The README


def test_readme_container_commands_work(engine: Podman | Docker, wheels: Path, tmp_path: Path) -> None:
    block = re.search(r"```bash\n(docker build .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    copy_context(tmp_path)
    # A replacement for the docker command; builds have no network.
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    offline = shlex.join(engines.offline(engine, wheels))
    command = shlex.join(engine.command)
    docker.write_text(f'#!/bin/sh\ncase $1 in build) shift; set -- build {offline} "$@" ;; esac\nexec {command} "$@"\n')
    docker.chmod(0o755)
    # Wait for the server: a person would type more slowly than it starts.
    script = block[1].replace(
        "docker exec", "until docker logs dsmq | grep -q 'listening on'; do sleep 0.1; done; docker exec"
    )
    environment = {**engine.environment, "PATH": f"{docker.parent}:{engine.environment['PATH']}"}
    try:
        done = subprocess.run(
            ["sh", "-euc", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        container = Container(engine, "dsmq")
        assert container.port() == 30008
        with client(container, token=(tmp_path / "token").read_text().strip()) as mq:
            assert mq.topics() == [("greetings", 1, 5)]
        assert "dsmq_messages 1.0" in fetch(container, "/metrics")
        engine("stop", container.id)
        assert container.state["ExitCode"] == 0
    finally:
        engine(*engine.remove, "dsmq", check=False)


# Compose

COMPOSE = HERE / "compose.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "deploy/cluster/compose.yaml").read_text())["services"]


def test_compose_accepts_shipped_file() -> None:
    command, text = compose()
    command += ["--file=-", "config"]
    done = subprocess.run(command, cwd=HERE, input=text, capture_output=True, text=True, timeout=SOON, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def compose(file: Path = COMPOSE) -> tuple[list[str], str]:
    """Return the installed command for compose and its file."""
    text = file.read_text()
    if shutil.which("docker"):
        done = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=SOON, check=False)
        if done.returncode == 0:
            return ["docker", "compose"], text
    # Version 1 does not support a top-level name.
    return [tool("docker-compose", "docker-compose")], re.sub("(?m)^name: .*\n", "", text)


@contextmanager
def composed(docker: Docker, file: Path) -> Iterator[Callable[..., str]]:
    """A function that runs commands of Compose; afterwards, everything is removed."""
    command, text = compose(file)
    words = [*command, "--file=-", "--project-name=dsmq"]
    # Docker checks the health more often than in production, to save time.
    text = text.replace("interval: 10s", "interval: 1s")

    def run(*more: str) -> str:
        options: dict[str, Any] = {"input": text, "cwd": file.parent, "env": docker.environment, "timeout": 4 * SOON}
        done = subprocess.run([*words, *more], capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        yield run
    finally:
        run("down", "--volumes")


def test_compose_runs_server(docker: Docker, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    here = tmp_path / "deploy/docker"
    (here / "secrets").mkdir(mode=0o700)
    for name in ("dsmq-token", "grafana-password"):
        (here / "secrets" / name).write_text(TOKEN)
    docker("tag", IMAGE, SERVICES["dsmq"]["image"])
    with composed(docker, here / "compose.yaml") as run:
        run("up", "--detach", "--no-build", "dsmq")
        container = Container(docker, docker("ps", "--quiet", "--filter=publish=30008").stdout.strip())
        wait_until(container.is_serving)
        assert_works(container)
        # As Prometheus does.
        assert "dsmq_puts_total 1.0" in fetch(container, "/metrics", Host="dsmq:30009")
        assert json.loads(container.logs()[0].splitlines()[0])["level"] == "info"
        limits = docker.inspect("container", container.id)["HostConfig"]
        assert (limits["Memory"], limits["PidsLimit"], limits["ReadonlyRootfs"]) == (2 << 30, 64, True)


def test_compose_runs_cluster_that_survives_a_node_and_a_server(docker: Docker, podman: Podman, tmp_path: Path) -> None:
    here = tmp_path / "cluster"
    shutil.copytree(ROOT / "deploy/cluster", here)
    subprocess.run([here / "secrets.sh", "nats-1", "nats-2", "nats-3"], check=True, timeout=SOON)
    token = (here / "secrets/dsmq-token").read_text().strip()
    docker("tag", IMAGE, CLUSTER["dsmq-1"]["image"])
    engines.provide_nats(podman, docker, CLUSTER["nats-1"]["image"])
    with ExitStack() as stack:
        run = stack.enter_context(composed(docker, here / "compose.yaml"))

        def await_health() -> None:
            containers = [Container(docker, name) for name in run("ps", "--quiet").split()]
            assert len(containers) == len(CLUSTER)
            wait_until(lambda: all(one.check_health() == "healthy" for one in containers), 2 * SOON)

        run("up", "--detach", "--no-build")
        await_health()
        stack.enter_context(docker.its_network())
        servers = ["127.0.0.1:30008", "127.0.0.1:30018"]
        # Each client has to move at least once.
        states: list[str] = []
        writer, reader = (
            stack.enter_context(connect(servers, token=token, on_state_change=states.append)) for _ in range(2)
        )
        for number, stopped in enumerate(("", "nats-1", "dsmq-1", "dsmq-2")):
            if stopped == "dsmq-2":
                run("start", "nats-1", "dsmq-1")
                await_health()
            if stopped:
                run("kill", stopped)
            writer.put("greetings", str(number))
            assert reader.get_wait("greetings", timeout=SOON) == str(number)
        assert states.count("lost") >= 2
        with connect(servers[0], token=token) as mq:
            mq.seek("greetings", 0)
            assert mq.get_many("greetings", 9) == ["0", "1", "2", "3"]


def test_files_mounted_by_compose_exist() -> None:
    mounted = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    files = [(source, target, *rest) for source, target, *rest in mounted if source.startswith(".")]
    assert len(files) == 5
    for source, _, *rest in files:
        assert (HERE / source).is_file(), source
        assert rest == ["ro"]
    assert {source for source, *_ in mounted if not source.startswith(".")} == set(
        yaml.safe_load(COMPOSE.read_text())["volumes"]
    )


@pytest.mark.parametrize("service", [*SERVICES.values(), *CLUSTER.values()], ids=[*SERVICES, *CLUSTER])
def test_compose_pins_confines_and_health_checks(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"])
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", []))
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["mem_limit"]
    assert service["pids_limit"]
    # The health check of dsmq can be in its image.
    assert "healthcheck" in service or service["image"].startswith("dsmq:")


def test_compose_prometheus_uses_an_allowed_host_name() -> None:
    config = yaml.safe_load((HERE / "prometheus.yml").read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert HTTPAuthenticator(names=host_names(SERVICES["dsmq"]["environment"]["DSMQ_HTTP_ALLOWED_HOSTS"])).accepts_host(
        target
    )
    assert not HTTPAuthenticator().accepts_host(target)


def test_compose_runs_current_version() -> None:
    assert SERVICES["dsmq"]["image"] == f"dsmq:{PROJECT['project']['version']}"


@pytest.mark.parametrize(
    ("ours", "shipped", "here", "there"),
    [
        ("prometheus.yml", "prometheus.yml", "dsmq:30009", "127.0.0.1:30009"),
        ("datasource.yml", "grafana/datasource.yml", "prometheus:9090", "127.0.0.1:9090"),
    ],
)
def test_files_mounted_by_compose_match_shipped_but_for_addresses(
    ours: str, shipped: str, here: str, there: str
) -> None:
    text = (HERE / ours).read_text()
    assert here in text
    assert yaml.safe_load(text.replace(here, there)) == yaml.safe_load(
        (ROOT / "deploy/prometheus" / shipped).read_text()
    )
