"""The program `dsmq`, which is `python -m dsmq` as well."""

import sys


def main() -> int:
    """Run the command line of this process; return its exit status."""
    try:
        # Here, because Ctrl-C may come while it loads, too.
        from dsmq.cli import main as run  # noqa: PLC0415

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
