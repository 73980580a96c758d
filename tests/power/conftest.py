"""What the tests of this directory start from: the store's modules on a machine, and a seed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.power.memory import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """The store's modules on a machine in memory, while the test lasts."""
    with Rig.installed() as rig:
        yield rig


@pytest.fixture
def seed() -> int:
    """A new seed each time, printed; `METERD_SEED` repeats one."""
    seed = int(os.environ.get("METERD_SEED", random.SystemRandom().randrange(2**32)))
    print(f"METERD_SEED={seed}")
    return seed
