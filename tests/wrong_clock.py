"""Run a command whose wall clock is wrong, even if it is statically linked: `python wrong_clock.py SECONDS COMMAND`.

The kernel gives each process a copy of a small library, the vDSO, with the function that reads the clocks. When the
command begins, that function is replaced in its copy.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

# From <linux/ptrace.h>, <linux/wait.h>, <linux/auxvec.h> and <elf.h>.
SEIZE, CONTINUE, DETACH, TRACE_EXEC, EVENT_EXEC = 0x4206, 7, 17, 0x10, 4
WALL = 0x40000000
SYSINFO_EHDR = 33
DYNSYM = 11
# For x86-64: mov eax, SYS_clock_gettime; syscall; test edi, edi (CLOCK_REALTIME); jnz +7; add qword [rsi], seconds; ret
CODE = bytes.fromhex("b8e4000000 0f05 85ff 7507 488106"), b"\xc3"


def prefix(seconds: int) -> list[str]:
    """Return the command that runs another one."""
    return [sys.executable, __file__, str(seconds)]


def works() -> bool:
    """Return whether this machine and its limits permit it."""
    command = [*prefix(-1_000_000), "date", "+%s"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and int(done.stdout) < time.time() - 900_000


def _ptrace(request: int, pid: int, data: int = 0) -> None:
    call = ctypes.CDLL(None, use_errno=True).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if call(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _function(image: bytes, name: bytes) -> int:
    """Return the address of a function in an ELF image."""
    (at,), (size, count) = struct.unpack_from("Q", image, 40), struct.unpack_from("HH", image, 58)
    sections = [struct.unpack_from("IIQQQQIIQQ", image, at + number * size) for number in range(count)]
    _, _, _, _, begin, length, link, *_ = next(section for section in sections if section[1] == DYNSYM)
    for entry in range(begin, begin + length, 24):
        its_name, _, _, _, address, _ = struct.unpack_from("IBBHQQ", image, entry)
        if image[sections[link][4] + its_name :].startswith(name + b"\0"):
            return int(address)
    raise LookupError(name)


def _replace(pid: int, seconds: int) -> None:
    words = dict(struct.iter_unpack("QQ", Path(f"/proc/{pid}/auxv").read_bytes()))
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(words[SYSINFO_EHDR])
        image = memory.read(8192)
        memory.seek(words[SYSINFO_EHDR] + _function(image, b"__vdso_clock_gettime"))
        memory.write(CODE[0] + struct.pack("i", seconds) + CODE[1])


def _attend(pid: int, seconds: int, ready: int) -> None:
    """Wait until a process begins a command and change its clock."""
    _ptrace(SEIZE, pid, TRACE_EXEC)
    os.write(ready, b"!")
    while (status := os.waitpid(pid, WALL)[1]) >> 16 != EVENT_EXEC:
        # It is stopped by a signal, which it gets now.
        _ptrace(CONTINUE, pid, os.WSTOPSIG(status))
    _replace(pid, seconds)
    _ptrace(DETACH, pid)


def main() -> None:
    seconds, *command = sys.argv[1:]
    if os.uname().machine != "x86_64":
        sys.exit("only for x86-64")
    pid, (reading, writing) = os.getpid(), os.pipe()
    if (child := os.fork()) == 0:
        # The command must not get a child that it does not know about.
        if os.fork() == 0:
            os.close(reading)
            _attend(pid, int(seconds), writing)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    if os.read(reading, 1):
        os.execvp(command[0], command)
    sys.exit("the clock can't be changed")


if __name__ == "__main__":
    main()
