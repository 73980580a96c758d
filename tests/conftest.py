"""How the tests are shared out between workers: `-n 2 --dist loadgroup`.

Most files start servers once for all of their tests, and some of their tests look at what the ones
before have left, so the tests of a file stay together and in order. Those named here need nothing
of one another: they fill the gaps.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
APART = ("unit", "simulation", "model", "power")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bind each file's tests to one worker, but for those that stand by themselves."""
    for item in items:
        place = item.path.relative_to(ROOT)
        if place.parts[0] not in APART:
            item.add_marker(pytest.mark.xdist_group(place.as_posix()))
