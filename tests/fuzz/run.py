"""One target under the fuzzer: `python -m tests.fuzz.run TARGET RUNS CORPUS`, then its options.

What is fuzzed is loaded here with its branches counted, which is why a test starts this as a
process of its own. In the end it says how many inputs took longer than they may, and which one took
longest, in processor time, so that a busy machine is no finding.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import atheris

SLOW_NS = 5_000_000  # The promise is 5 ms an input.
WATCHED = ["meterd", "tomllib"]


class Watch:
    """A target with a look at the clock."""

    def __init__(self, name: str, runs: int) -> None:
        from tests.fuzz.targets import TARGETS

        self._name = name
        self._wanted = runs
        self._target = TARGETS[name]
        self._runs = self._slow = self._slowest_ns = 0
        self._slowest = b""

    def __call__(self, data: bytes) -> None:
        """Run one input; an exception is the fuzzer's to report."""
        began = time.process_time_ns()
        self._target(data)
        took = time.process_time_ns() - began
        self._runs += 1
        if took > SLOW_NS:
            self._slow += 1
        if took > self._slowest_ns:
            self._slowest_ns, self._slowest = took, data
        if self._runs == self._wanted:  # Behind the last run libFuzzer ends the process at once.
            self._report()

    def _report(self) -> None:
        """Say it in one line, for a person and for a test."""
        line = {
            "target": self._name,
            "runs": self._runs,
            "over_5_ms": self._slow,
            "slowest_us": self._slowest_ns // 1000,
            "slowest_input": repr(self._slowest[:120]),
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Fuzz until the runs are done or something is found."""
    name, runs, *options = sys.argv[1:]
    with atheris.instrument_imports(include=WATCHED, enable_loader_override=False):
        watch = Watch(name, int(runs))
    words = Path(__file__).with_name("words.dict")
    atheris.Setup([sys.argv[0], f"-dict={words}", f"-runs={runs}", *options], watch)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
