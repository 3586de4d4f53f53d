"""The `dsmq` command, also `python -m dsmq`. Data goes to stdout, everything else to stderr (but see log_stream).

Exit status: 0 success, 1 failure (no server, an error reply, the server can't start), 2 invalid usage or
configuration, 3 no message printed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

# Other modules are imported in functions, so that each command loads only what it needs, and Ctrl-C is handled while it
# loads.

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status."""
    try:
        return _run(list(sys.argv[1:] if words is None else words))
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: list[str]) -> int:
    from dsmq.errors import ConfigError, DSMQError

    is_server = words[:1] == ["serve"]
    _prepare_streams(is_server=is_server)
    try:
        try:
            if is_server:
                _early_signals()
            return _command(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The program that reads the output, such as `head`, has exited.
        _discard_output()
        return FAILED
    except ConfigError as error:
        return _report(error, USAGE)
    except (DSMQError, OSError) as error:
        _discard_output()
        return _report(error, FAILED)


def _command(words: list[str]) -> int:
    from dsmq.cli import parser

    if "_ARGCOMPLETE" in os.environ:
        from dsmq.cli import completion, main

        completion.complete(main.connect_to)
    options = parser.parse(words)
    if run := _COMMANDS.get(options.command):
        run(options)
        return OK
    from dsmq.cli import main

    return main.run(options)


def _report(error: Exception, status: int) -> int:
    from dsmq.client.replies import reason
    from dsmq.terminal import printable

    sys.stderr.write(f"dsmq: {printable(reason(error))}\n")
    return status


def _prepare_streams(*, is_server: bool) -> None:
    # If a stream is closed (`>&-` in a shell), the next socket would get its descriptor. Writing to a closed stdout
    # fails, so that no message counts as printed.
    output = os.O_WRONLY if is_server else os.O_RDONLY
    for name, mode, flags in (("stdin", "r", os.O_RDONLY), ("stdout", "w", output), ("stderr", "w", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, flags), mode))  # noqa: SIM115 - for as long as the process runs
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The terminal's encoding may lack some characters.
        sys.stdout.reconfigure(errors="backslashreplace")


def _early_signals() -> None:
    """Handle signals while the server is still loading its modules."""
    from dsmq.system import has_terminal

    # As the first process of a container, it would ignore signals that it has no handler for. The handlers raise no
    # SystemExit, which Python would discard in the middle of a weakref callback or `__del__`.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(OK))
    # Windows has no SIGHUP. If nohup has set it to be ignored, keep that, because the server checks for it later.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        had_terminal = has_terminal()
        # A reload request is ignored while the configuration is being loaded for the first time.
        signal.signal(signal.SIGHUP, lambda *_: os._exit(OK) if had_terminal and not has_terminal() else None)


def _discard_output() -> None:
    # Otherwise Python fails to flush its buffers at exit and prints an error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _serve(options: argparse.Namespace) -> None:
    from dsmq import logs, server
    from dsmq import settings as config
    from dsmq.ops import systemd
    from dsmq.system import allow_more_files

    settings = config.from_options(options)
    logs.never_block()
    logs.start(*settings.logging)
    allow_more_files()
    server.run(settings, lambda: config.from_options(options), systemd.take())


def _config(options: argparse.Namespace) -> None:
    from dsmq import settings as config
    from dsmq.terminal import printable

    text = config.example() if options.example else config.to_toml(config.from_options(options))
    if sys.stdout.isatty():
        sys.stdout.write("\n".join(map(printable, text.split("\n"))))
    else:
        # TOML is always UTF-8, regardless of the locale.
        sys.stdout.buffer.write(text.encode(errors="backslashreplace"))


def _demo(options: argparse.Namespace) -> None:
    from dsmq import demo, demo_cluster

    (demo_cluster if options.cluster else demo).main()


def _completion(options: argparse.Namespace) -> None:
    from dsmq.cli import completion

    completion.print_script(options.shell)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "serve": _serve,
    "config": _config,
    "demo": _demo,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
