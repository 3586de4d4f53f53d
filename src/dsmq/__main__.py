"""The `dsmq` command, also `python -m dsmq`."""

import sys


def main() -> int:
    """Run the command line of this process; return its exit status."""
    try:
        # Imported here, so that Ctrl-C is also handled while it loads.
        from dsmq.cli import main as run  # noqa: PLC0415

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
