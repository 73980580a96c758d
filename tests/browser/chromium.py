"""Chromium as Debian packages it: the browser that the dashboard is tried in.

The rule kept here: nothing is downloaded for a browser, and a mistake of the page's script or a
breach of its policy is never overlooked.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run one, until the block ends."""
    program = shutil.which("chromium")
    assert program is not None, "there is no chromium; install it: tests/install-servers"
    with sync_playwright() as player:
        # Without its sandbox, because tests run as root in containers; it sees our page alone.
        browser = player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
