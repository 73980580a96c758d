from __future__ import annotations

import re
from importlib.resources import files

import pytest

FILES = ("index.html", "style.css", "app.js")
DASHBOARD = files("meterd.api").joinpath("dashboard")


def text_of(name: str) -> str:
    return DASHBOARD.joinpath(name).read_text()


async def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(world):
    """No foreign address, no inline script, no frame."""
    answer = await world.get("/")
    policy = answer.headers["Content-Security-Policy"]

    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("path", ["/", "/dashboard/app.js", "/dashboard/style.css"])
async def test_an_unchanged_file_is_not_sent_again(world, path):
    """The tag of the content decides."""
    first = await world.get(path)
    again = await world.get(path, headers={"If-None-Match": first.headers["ETag"]})

    assert (first.status, again.status, again.body) == (200, 304, b"")


async def test_everything_that_the_page_asks_for_is_served(world):
    """Files and data: a name that is misspelt in the page fails here."""
    asked = set(re.findall(r'(?:href|src)="(/[^"]*)"', text_of("index.html")))
    asked |= {path.split("?")[0] for path in re.findall(r'ask\([`"](/[^`"]*)', text_of("app.js"))}
    answers = {path: (await world.get(path)).status for path in sorted(asked)}

    assert len(asked) == 7
    assert set(answers.values()) == {200}


def test_every_element_that_the_script_looks_for_is_in_the_page():
    """Ids are spelt once in each file."""
    wanted = set(re.findall(r'(?:at|say|rows)\(\s*"([a-z-]+)"', text_of("app.js")))
    there = set(re.findall(r'id="([a-z-]+)"', text_of("index.html")))

    assert wanted <= there


@pytest.mark.parametrize("name", FILES)
def test_no_file_asks_for_anything_from_outside(name):
    """The page works offline."""
    text = text_of(name).replace("http://www.w3.org/2000/svg", "")

    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)


def test_texts_from_outside_only_become_text():
    """Nothing in the script can make markup or code of a text."""
    script = text_of("app.js")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|setHTML|srcdoc"
    )

    assert not re.search(forbidden, script)
    assert "textContent" in script
    assert not re.search(r"\son[a-z]+=|<style|style=", text_of("index.html"))


async def test_a_hostile_text_stays_what_it_is_on_its_way_to_the_page(world):
    """JSON, told to be JSON, and never sniffed."""
    hostile = "<img src=x onerror=alert(1)>"
    await world.call("PUT", "/v1/agreements/esc_2", {"plan": "stream", "payer": hostile})
    answer = await world.get("/v1/agreements/esc_2")

    assert answer.json["payer"] == hostile
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
