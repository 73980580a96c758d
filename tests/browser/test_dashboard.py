"""The dashboard of a real daemon in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.acceptance.stage import SECONDS, Node, configuration
from tests.browser.chromium import chromium
from tests.processes import Sandbox

HOSTILE = "<img src=x onerror=\"document.title='broken'\">"
TOKENS = """
[[http.tokens]]
name = "reader"
token = "read-token-of-the-test-000000000000"
scopes = ["read"]
"""


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Page:
    found = browser.new_page()
    found.set_default_timeout(SECONDS * 1000)
    expect.set_options(timeout=SECONDS * 1000)
    return found


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with Sandbox(tmp_path / "sandbox") as server:
        yield server


@pytest.fixture
def node(sandbox: Sandbox, tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path, configuration(sandbox)) as found:
        found.wait_ready()
        yield found


def test_figures_follow_the_usage_while_somebody_looks(page, node, sandbox):
    """Without a reload: the stream tells that money moved, and what moved is shown."""
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(node.url)
    expect(page.locator("#live")).to_have_text("live")
    escrow = sandbox.lock("10.00")
    node.bind(escrow, "stream", "customer-1")
    node.use(escrow, 20, "e-1")
    expect(page.locator("#released")).to_have_text("0.02")
    expect(page.locator("#accrued")).to_have_text("0.02")
    expect(page.locator("#agreements")).to_contain_text("customer-1")
    page.locator("#releases summary").first.click()
    expect(page.locator("#releases .history").first).to_contain_text("intended")

    assert wrong == []


def test_page_goes_on_by_itself_when_the_daemon_is_back(page, node, sandbox):
    """Killed, it says so; started again, the figures are new."""
    escrow = sandbox.lock("10.00")
    node.bind(escrow, "stream", "customer-1")
    page.goto(node.url)
    expect(page.locator("#agreements")).to_contain_text("customer-1")
    node.kill()
    expect(page.get_by_role("alert").first).to_contain_text("does not answer")
    node.start()
    node.wait_ready()
    node.use(escrow, 20, "e-1")
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator("#released")).to_have_text("0.02")
    expect(page.locator("#lost")).to_be_hidden()


def test_person_freezes_and_resumes_with_a_reason(page, node, sandbox):
    """What is frozen stands on top with the command to type; the journal has the reason."""
    node.bind(sandbox.lock("10.00"), "stream", "customer-1")
    page.goto(node.url)
    expect(page.locator("#agreements")).to_contain_text("active")
    page.get_by_role("button", name="Freeze customer-1").click()
    page.get_by_label("Reason").fill("a look at the bill")
    page.get_by_role("button", name="Do it").click()
    expect(page.locator("#attention")).to_contain_text("customer-1")
    expect(page.locator("#attention code").first).to_contain_text("meterd")
    page.get_by_role("button", name="Resume customer-1").click()
    page.get_by_label("Reason").fill("all is well")
    page.keyboard.press("Enter")
    expect(page.locator("#attention-card")).to_be_hidden()
    journal = node.get("/v1/journal?limit=20")["items"]

    assert {"a look at the bill", "all is well"} <= {
        word
        for entry in journal
        for word in ("a look at the bill", "all is well")
        if word in str(entry)
    }


def test_person_replays_a_dead_letter_once_it_can_be_counted(page, node, sandbox):
    """Before, the page says what is still wrong with it; after, the letter is gone."""
    escrow = sandbox.lock("10.00")
    event = {"id": "e-1", "escrow_id": escrow, "meter": "units", "quantity": 20}
    assert node.ask("POST", "/v1/events", [event]).json["rejected"]
    page.goto(node.url)
    replay = page.get_by_role("button", name="Replay dead letter")
    replay.click()
    expect(page.locator("#said")).to_contain_text("rejected again")
    node.bind(escrow, "stream", "customer-1")
    replay.click()
    expect(page.locator("#said")).to_contain_text("is counted")
    expect(page.locator("#letters")).to_contain_text("None.")
    expect(page.locator("#released")).to_have_text("0.02")


def test_texts_of_customers_are_shown_and_not_obeyed(page, node, sandbox):
    """A payer's name and a payload that are markup stay letters."""
    escrow = sandbox.lock("10.00")
    body = {"plan": "stream", "payer": HOSTILE, "escrows": {"main": escrow}}
    assert node.ask("PUT", "/v1/agreements/customer-1", body).status in {200, 201}
    node.ask("POST", "/v1/events", [{"id": "e-1", "agreement": "nobody", "meter": HOSTILE}])
    page.goto(node.url)
    expect(page.locator("#agreements")).to_contain_text("<img src=x")
    page.locator("#letters summary").first.click()
    expect(page.locator("#letters pre").first).to_contain_text("<img src=x")

    assert page.locator("img").count() == 0
    assert page.title() == "meterd"


def test_quote_is_priced_and_a_wrong_one_says_why(page, node):
    """The working comes with the price; a mistake is named."""
    page.goto(node.url)
    page.locator("#quote-plan").select_option("stream")
    page.get_by_label("Quantity").fill("1500")
    page.get_by_role("button", name="Price it").click()
    expect(page.locator("#quote-answer")).to_contain_text("1.50 USDC")
    page.get_by_label("Quantity").fill("much")
    page.keyboard.press("Enter")
    expect(page.locator("#quote-answer .bad")).to_contain_text("units")


def test_phone_shows_everything_without_scrolling_sideways(page, node, sandbox):
    """Tables become cards."""
    node.bind(sandbox.lock("10.00"), "stream", "customer-with-a-name-as-lawyers-like-them")
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(node.url)
    expect(page.locator("#agreements")).to_contain_text("customer-with")

    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_page_asks_for_a_token_where_the_daemon_wants_one(page, sandbox, tmp_path):
    """It stays in the tab; one that may read and not act is told so."""
    with Node(tmp_path, configuration(sandbox) + TOKENS) as node:
        node.wait_ready()
        page.goto(node.url)
        page.get_by_label("token").fill("read-token-of-the-test-000000000000")
        page.get_by_role("button", name="Open").click()
        expect(page.locator("#live")).to_have_text("live")
        expect(page.locator("#letters")).to_contain_text("scope admin")

    assert page.evaluate("localStorage.length") == 0
