"""`python -m bench`: measure on this machine, print a table, keep the results as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from bench import gate_rows, http_rows, mqtt_rows, redis_rows, release_rows, weight_rows
from bench.figures import Row, machine, print_table
from bench.plan import Plan
from bench.stage import Stage

RESULTS = Path(__file__).parent / "results" / "latest.json"
SERVERS = (("redis-server", "--version"), ("mosquitto", "-h"))

ROWS: Mapping[str, Callable[[Plan], list[Row]]] = {
    "redis-exclusive": partial(redis_rows.run, mode="exclusive"),
    "redis-group": partial(redis_rows.run, mode="group"),
    "mqtt": mqtt_rows.run,
    "http": http_rows.run,
    "gate": gate_rows.run,
    "release-latency": release_rows.soon,
    "releases": release_rows.at_once,
    "size": weight_rows.size,
    "idle": weight_rows.idle,
    "growth": weight_rows.growth,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="everything once, small, unjudged")
    parser.add_argument("--only", action="append", choices=list(ROWS), help="these rows alone")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of each row")
    parser.add_argument("--events", type=int, default=500_000, help="in the Redis backlog")
    parser.add_argument("--known", type=int, default=10_000_000, help="identities known before")
    parser.add_argument("--agreements", type=int, default=100_000, help="where many are measured")
    parser.add_argument("--releases", type=int, default=2_000, help="due at once")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of doing nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    given = parser.parse_args()
    console = Console(width=140)
    with Stage() as stage:
        plan = Plan(
            stage,
            console,
            repeat=1 if given.smoke else given.repeat,
            events=min(given.events, 5_000) if given.smoke else given.events,
            known=min(given.known, 50_000) if given.smoke else given.known,
            agreements=min(given.agreements, 300) if given.smoke else given.agreements,
            releases=min(given.releases, 50) if given.smoke else given.releases,
            idle_s=1.0 if given.smoke else given.idle,
            smoke=given.smoke,
        )
        rows: list[Row] = []
        for name in given.only or ROWS:
            console.print(f"[bold]{name}[/bold]")
            rows += ROWS[name](plan)
    facts = machine(SERVERS)
    document = {
        "command": _command(sys.argv[1:]),
        "machine": facts,
        "judged": not given.smoke,
        "rows": [row.document() for row in rows],
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(document, indent=1) + "\n")
    console.print(
        f"{facts['date']}, {facts['cores']} cores {facts['processor']}, Python {facts['python']}"
    )
    print_table(rows, console, judged=not given.smoke)
    return 0


def _command(arguments: Sequence[str]) -> str:
    """What was typed, without the place on this machine where the results go."""
    words = iter(arguments)
    kept = []
    for word in words:
        if word == "--results":
            next(words, None)
        elif not word.startswith("--results="):
            kept.append(word)
    return " ".join(["python -m bench", *kept])


if __name__ == "__main__":
    sys.exit(main())
