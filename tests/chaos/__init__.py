"""Check the promises under faults: `python tests/chaos --minutes 10 --seed 1`.

Four writers and four readers, and two more with redis-py, work while everything that can break does. Connections are
reset at any byte, or go dead. The server is stopped, killed, suspended, or has no space on its disk. Clients are
interrupted at any line, fork, or are cancelled. Then a checker goes through everything that each of them put and read.
`--figures` measures restarts and what all this costs; `--mutants` checks that servers with defects are found out.
"""
