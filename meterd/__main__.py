"""`python -m meterd` and the console script `meterd`.

The rule: meterd's invariants are assertions and must be switched on, so it refuses to start
without them.
"""

from __future__ import annotations

import sys

from meterd.cli.main import main as command_line

OPTIMISED = (
    "meterd: Python runs with -O (or PYTHONOPTIMIZE), which switches off the checks that guard the"
    " money. Start it without: python -m meterd\n"
)


def main() -> int:
    """Run the command line; its exit code is the one that its help explains."""
    if not __debug__:
        sys.stderr.write(OPTIMISED)
        return 2
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
