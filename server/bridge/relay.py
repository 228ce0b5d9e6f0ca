"""Runs a command and passes on what it writes, up to a limit; then both end.

python relay.py BYTES LINES COMMAND...

What reads the protocol from a pipe holds all of it until a line ends. A command that never ends
one, or ends nothing else, is stopped here instead, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

CHUNK = 1 << 16


def relay(most: int, most_lines: int, command: list[str]) -> int:
    """The command's exit status, or 1 if it wrote too much."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), CHUNK):
            most -= len(chunk)
            most_lines -= chunk.count(b"\n")
            if most < 0 or most_lines < 0:
                process.kill()
                sys.stderr.write("an MCP server wrote more than is taken\n")
                return 1
            while chunk:
                chunk = chunk[os.write(1, chunk) :]
        # Whoever closes its pipe has ended, for those who read.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return process.returncode


if __name__ == "__main__":
    sys.exit(relay(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
