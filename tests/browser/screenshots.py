"""Makes the pictures of the README: `python -m tests.browser.screenshots`.

The rule kept here: what they show was really counted, released and frozen by a daemon; nothing of
it is painted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.acceptance.stage import SECONDS, Node, configuration
from tests.browser.chromium import chromium
from tests.processes import Sandbox

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
CUSTOMERS = ("ada-labs", "grace-gmbh", "hopper-shipping")
ROUNDS = 14


def main() -> None:
    """Run a little business, and photograph its page."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        place = Path(name)
        with (
            Sandbox(place / "sandbox") as sandbox,
            Node(place, configuration(sandbox)) as node,
        ):
            node.wait_ready()
            page = browser.new_page(
                viewport={"width": 1180, "height": 1000}, reduced_motion="reduce"
            )
            page.goto(node.url)
            expect(page.locator("#live")).to_have_text("live", timeout=SECONDS * 1000)
            _trade(page, node, sandbox)
            page.screenshot(path=IMAGES / "dashboard.png", animations="disabled")
            page.set_viewport_size({"width": 390, "height": 844})
            page.emulate_media(color_scheme="dark")
            page.screenshot(path=IMAGES / "dashboard-phone.png", animations="disabled")
    sys.stdout.write(f"{IMAGES}: dashboard.png, dashboard-phone.png\n")


def _trade(page: Page, node: Node, sandbox: Sandbox) -> None:
    escrows = [sandbox.lock(amount) for amount in ("10.00", "25.00", "5.00")]
    for escrow, customer in zip(escrows, CUSTOMERS, strict=True):
        node.bind(escrow, "stream", customer)
    for turn in range(ROUNDS):
        for number, escrow in enumerate(escrows):
            quantity = 37 + 23 * ((turn * (number + 2)) % 7)
            node.use(escrow, quantity, f"e-{turn}-{number}")
        page.wait_for_timeout(700)
    node.send({"id": "e-x", "agreement": CUSTOMERS[0], "meter": "teapots", "quantity": 1})
    reason = {"reason": "the bill is disputed"}
    node.ask("POST", f"/v1/agreements/{CUSTOMERS[2]}/freeze", reason)
    node.use(escrows[2], 90, "e-late")
    expect(page.locator("#attention")).to_contain_text(CUSTOMERS[2], timeout=SECONDS * 1000)
    page.wait_for_timeout(1500)


if __name__ == "__main__":
    main()
