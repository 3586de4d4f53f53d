"""Escapes text, so that clients can't control terminals or forge log lines with it."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any

# C0, DEL and C1 controls; line separators; bidirectional controls, which can disguise text; and surrogates, which
# can't be encoded.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return text on one line, with control characters escaped."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def as_json(value: object) -> str:
    """Return a value as JSON on one line, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(value, default=str) if _UNSAFE.search(text) else text


def quoted(value: object) -> str:
    """Return a value for an error message, shortened if necessary."""
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to convert huge integers to text.
        return "a number with thousands of digits"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def show_progress(text: str) -> None:
    """Replace the last line on the terminal; an empty text clears it."""
    sys.stderr.write(f"\r\033[K{text}")
    sys.stderr.flush()


class LineFormatter(logging.Formatter):
    """Formats each log record as one line; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join(map(printable, super().formatException(ei).split("\n")))
