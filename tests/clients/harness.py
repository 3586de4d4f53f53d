"""Third-party Redis client libraries: how to install each, and the programs that use them.

A program is started with a port, a version of RESP and a token, which may be empty. It reads requests from its input:

    call WORD ...           send this command, as the library sends commands that it does not know
    read TOPIC              print "- id body" for each message, once, over all restarts, until the message "end"
    write TOPIC FIRST LAST  put these numbers, once, over all restarts, and print "- id number" for each; "? number" if
                            it may have been stored in an earlier run of the server
    pipeline TOPIC COUNT    put messages of 50 bytes in one pipeline, and print how many ids were returned
    transaction WORD ...    run commands of three words in what the library calls a transaction
    shutdown                stop the server, by the library's own method if it has one

The answer to each is "= reply", with an array as one line of words, or "! error". A line with # is an error that the
library passes to an error handler, not to the caller.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import SOON, tool

PROGRAMS = Path(__file__).parent / "programs"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmq-tests" / "clients"
GOPATH = Path("/usr/share/gocode")


class Program:
    """A running program that uses a library."""

    def __init__(self, command: list[str], environment: dict[str, str], port: int, protocol: int, token: str) -> None:
        self.said: list[str] = []
        """The lines printed before its answer."""
        self.errors: list[str] = []
        """Its errors, including those passed to an error handler."""
        self._answers: queue.Queue[str] = queue.Queue()
        self.process = subprocess.Popen(
            [*command, str(port), str(protocol), token],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **environment},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line[0] in "=!":
                self._answers.put(line.strip())
            elif line[0] != "#":
                self.said.append(line.strip())
            if line[0] in "#!":
                self.errors.append(line.strip())
        self._answers.put("the program has ended")

    def tell(self, *words: str | int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")

    def answer(self, seconds: float = SOON * 3) -> str:
        return self._answers.get(timeout=seconds)

    def ask(self, *words: str | int) -> str:
        self.tell(*words)
        return self.answer()

    def call(self, *words: str | int) -> str:
        return self.ask("call", *words)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()


@dataclass(frozen=True)
class Library:
    """One version of a library; `install` returns the command that runs its program."""

    name: str
    prepare: Callable[[], list[str]]
    path: Path | None = None
    """The path where Python finds it."""
    protocols: tuple[int, ...] = (2,)

    @contextmanager
    def running(self, port: int, protocol: int = 2, token: str = "") -> Iterator[Program]:
        environment = {"PYTHONPATH": str(self.path)} if self.path else {}
        program = Program(self.prepare(), environment, port, protocol, token)
        try:
            yield program
        finally:
            program.close()

    def __str__(self) -> str:
        return self.name


def _python(program: str, package: str, protocols: tuple[int, ...] = (2,)) -> Library:
    """Install a package in this version; not needed for the redis-py that is installed with the tests."""
    folder = CACHE / f"{package}-{sys.implementation.cache_tag}" if "==" in package else None

    def prepare() -> list[str]:
        if folder:
            _install(folder, sys.executable, "-m", "pip", "install", "--quiet", "--target", "{}", package)
        return [sys.executable, str(PROGRAMS / program)]

    return Library(package.replace("redis==", "redis-py-"), prepare, folder, protocols)


def _node(program: str, package: str, version: str, protocols: tuple[int, ...] = (2,)) -> Library:
    name = f"{package}-{version}"
    folder = CACHE / name

    def prepare() -> list[str]:
        options = "--silent", "--no-audit", "--no-fund", "--prefix", "{}"
        _install(folder, tool("npm", "npm"), "install", *options, f"{package}@{version}")
        return [tool("node", "nodejs"), str(PROGRAMS / program), str(folder / "node_modules" / package)]

    return Library(name, prepare, None, protocols)


def _install(folder: Path, *command: str) -> None:
    """Return a folder that a command fills, cached for later runs; skip if the registry is unreachable."""
    if folder.exists():
        return
    unfinished = folder.with_suffix(f".{os.getpid()}")
    unfinished.mkdir(parents=True)
    done = subprocess.run([word.format(unfinished) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(unfinished)
        pytest.skip(f"{command[-1]} can't be installed: {done.stderr.strip()[-200:]}")
    unfinished.rename(folder)


def _php() -> list[str]:
    command = [tool("php", "php-cli"), str(PROGRAMS / "phpredis.php")]
    _need(["php", "-r", "new Redis();"], "php-redis")
    return command


def _ruby() -> list[str]:
    command = [tool("ruby", "ruby"), str(PROGRAMS / "redis_rb.rb")]
    _need(["ruby", "-e", "require 'redis'"], "ruby-redis")
    return command


def _c() -> list[str]:
    _need([tool("gcc", "gcc"), "-include", "hiredis/hiredis.h", "-E", "-x", "c", "/dev/null"], "libhiredis-dev")
    return _compiled("hiredis.c", ["gcc", "-Wall", "-Werror", "-O1"], ["-lhiredis"])


def _go(program: str, package: str, debian: str) -> Library:
    """Return a Debian package, in the installed version."""

    def prepare() -> list[str]:
        go = tool("go", "golang-go")
        if not (GOPATH / "src" / package).exists():
            pytest.skip(f"Debian's package {debian} is not installed")
        settings = "CGO_ENABLED=0", "GO111MODULE=off", f"GOPATH={GOPATH}"
        return _compiled(program, ["env", *settings, go, "build"], [str(PROGRAMS / "serve.go")])

    return Library(Path(program).stem.replace("_", "-"), prepare)


def _need(command: list[str], package: str) -> None:
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"Debian's package {package} is not installed")


def _compiled(source: str, compiler: list[str], more: list[str]) -> list[str]:
    """Compile a program with these files and libraries, unless it is newer than all its files."""
    binary = CACHE / Path(source).stem
    files = [PROGRAMS / source, *(Path(name) for name in more if Path(name).exists())]
    if not binary.exists() or binary.stat().st_mtime < max(file.stat().st_mtime for file in files):
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = binary.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, "-o", str(unfinished), str(PROGRAMS / source), *more], check=True)
        unfinished.rename(binary)
    return [str(binary)]


LIBRARIES = [
    _python("redis_py.py", "redis==4.6.0"),
    _python("redis_py.py", "redis==5.2.0", (2, 3)),
    _python("redis_py.py", "redis-py", (2, 3)),
    _node("ioredis.js", "ioredis", "3"),
    _node("ioredis.js", "ioredis", "5"),
    _node("ioredis.js", "ioredis", "6"),
    _node("node_redis.js", "redis", "3"),
    _node("node_redis.js", "redis", "4.7"),
    _node("node_redis.js", "redis", "6", (2, 3)),
    Library("phpredis", _php),
    Library("redis-rb", _ruby),
    Library("hiredis", _c),
    _go("redigo.go", "github.com/gomodule/redigo", "golang-github-gomodule-redigo-dev"),
    _go("go_redis.go", "gopkg.in/redis.v5", "golang-gopkg-redis.v5-dev"),
]
GLIDE = _python("glide.py", "valkey-glide-sync==2.6.0")
