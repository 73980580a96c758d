"""The configuration: TOML, environment and secret files in, frozen settings or mistakes out.

The rule: nothing else in meterd reads a file of settings or the environment. `values` reads what
stands behind a `=`, `settings` and `plans` hold every key with its default, `shape` looks at those
models, `environment` overrides, `patterns` compares the keys of a plan, `checks` compares tables,
`reading` is the way through all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meterd.config.plans import PATTERNS, PlanSettings, RateSettings, SettleSettings
from meterd.config.reading import find, load, parse
from meterd.config.settings import (
    AgreementSettings,
    DaemonSettings,
    DedupeSettings,
    DiscoverSettings,
    EscrowPaths,
    EscrowSettings,
    HttpSettings,
    IngestSettings,
    LogSettings,
    MeterSettings,
    MetricsSettings,
    MqttSourceSettings,
    ProducerSettings,
    RedisSourceSettings,
    Settings,
    SourceSettings,
    StoreSettings,
    TokenSettings,
    WalletSettings,
)
from meterd.config.values import Address, Duration, Secret

__all__ = [
    "PATTERNS",
    "Address",
    "AgreementSettings",
    "DaemonSettings",
    "DedupeSettings",
    "DiscoverSettings",
    "Duration",
    "EscrowPaths",
    "EscrowSettings",
    "HttpSettings",
    "IngestSettings",
    "LogSettings",
    "MeterSettings",
    "MetricsSettings",
    "MqttSourceSettings",
    "PlanSettings",
    "ProducerSettings",
    "RateSettings",
    "RedisSourceSettings",
    "Secret",
    "Settings",
    "SettleSettings",
    "SourceSettings",
    "StoreSettings",
    "TokenSettings",
    "WalletSettings",
    "example",
    "find",
    "load",
    "parse",
    "schema",
]


def example(pattern: str = "") -> str:
    """A configuration with every key, its default and a comment; the same as config/meterd.toml.

    With the name of a billing pattern, a whole example of it: the same as config/PATTERN.toml.
    """
    here = Path(__file__).parent
    file = here / "examples" / f"{pattern}.toml" if pattern else here / "example.toml"
    return file.read_text(encoding="utf-8")


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file, for editors.

    Nothing is required in it that the environment or a secret file may give.
    """
    described = Settings.model_json_schema(by_alias=True)
    described["required"].remove("escrow")
    definitions = described["$defs"]
    definitions["EscrowSettings"]["required"].remove("api_key")
    definitions["TokenSettings"]["required"].remove("token")
    definitions["AgreementSettings"]["required"].remove("id")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **described,
        "title": "meterd.toml",
    }
