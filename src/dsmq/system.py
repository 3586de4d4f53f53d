"""What is asked of the operating system for the sake of speed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, partial

yield_processor: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))
"""Let another thread run that waits for this processor; without one, go on at once."""
LONG_YIELD_SECONDS = 0.001
"""Who did not get the processor back for so long shares it with programs that compute: then it is better to sleep."""
LONG_YIELD_PAUSE_SECONDS = 0.1
"""For so long: the kernel wakes who has slept sooner than it returns to who has yielded."""
LONG_MESSAGE_BYTES = 65_536
"""From here on it is worth to `expect_long_messages`."""


@cache
def expect_long_messages() -> None:
    """Have the C library keep freed memory for the next long message, in place of fetching it anew each time.

    glibc's malloc learns from what it is given back: from then on it keeps up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
    Fresh memory costs a page fault for every 4 KiB.
    """
    bytes(16 << 20)
