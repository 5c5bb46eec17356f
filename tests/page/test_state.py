"""What is asked for stands in the address, in the history, and in what is exported."""

import json
import subprocess
import sys
from typing import Any

import httpx
import pytest

from tests.page.conftest import ROOT, Opened

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.page


def changed(at: Opened) -> None:
    """Makes a comparison that is not the first one."""
    at.page.get_by_role("button", name="What sound does a cow make?").click()
    at.page.get_by_role("button", name="truthfulness alone").click()
    at.page.get_by_text("Sampling", exact=False).first.click()
    at.page.get_by_label("Seed", exact=True).fill("7")


def test_a_link_is_a_comparison(at: Opened, open_page: Any) -> None:
    changed(at)
    at.run()
    at.page.wait_for_timeout(400)
    other: Opened = open_page(at.page.url)
    other.arm("truthfulness alone").wait_for()
    other.run()
    assert other.bodies("/compare") == at.bodies("/compare")
    for name in ("baseline", "steered", "truthfulness alone"):
        assert other.text(name) == at.text(name)


@pytest.mark.parametrize("fragment", ["compare=bm9uc2Vuc2U", "compare=%%%", "no-such-view=e30"])
def test_an_address_that_cannot_be_read_is_told_and_harms_nothing(url: str, open_page: Any, fragment: str) -> None:
    opened: Opened = open_page(f"{url}/#{fragment}")
    expect(opened.page.get_by_role("status").filter(has_text="This address holds no comparison")).to_be_visible()
    opened.run()
    assert opened.text("baseline")


def test_the_history_brings_a_run_back(at: Opened) -> None:
    at.run()
    first = at.text("steered")
    changed(at)
    at.run()
    at.page.reload()
    at.page.get_by_role("button", name="History").click()
    entries = at.page.locator(".history button")
    expect(entries).to_have_count(2)
    expect(entries.last).to_contain_text(first)
    entries.last.click()
    expect(at.page.get_by_label("Prompt", exact=True)).to_have_value("Q: What is the capital of Japan? A:")
    expect(at.page.locator(".arm")).to_have_count(2)
    at.run()
    assert at.text("steered") == first


def export(at: Opened, format: str) -> str:
    at.page.get_by_role("button", name="Share and export").click()
    at.page.get_by_role("button", name=format, exact=True).click()
    code: str = at.page.locator("pre.code").text_content()
    at.page.get_by_role("dialog").get_by_role("button", name="Close").click()
    return code


@pytest.mark.parametrize("mode", ["Prompt", "Chat"])
def test_what_is_exported_gives_the_same_answers(url: str, at: Opened, mode: str) -> None:
    at.page.get_by_role("button", name=mode, exact=True).click()
    if mode == "Prompt":
        at.page.get_by_label("Prompt", exact=True).fill('Q: What\'s the "sound" of a cow?\n\\ 牛 A:')
    at.arm("steered").get_by_role("button", name="another checkpoint").click()
    at.page.get_by_text("Sampling", exact=False).first.click()
    at.page.get_by_label("Seed", exact=True).fill("")
    at.page.get_by_role("button", name="Run", exact=True).click()
    expect(at.arm("steered").locator(".provenance")).to_contain_text("demo@v2")
    shown = {name: at.text(name) for name in ("baseline", "steered")}

    done = subprocess.run(export(at, "curl"), shell=True, capture_output=True, text=True, check=True)
    by_curl = {arm["name"]: arm["results"][0]["text"].strip() for arm in json.loads(done.stdout)["arms"]}
    assert by_curl == shown

    run = [sys.executable, "-c", export(at, "Python")]
    printed = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert [line.split() for line in printed.splitlines()] == [
        f"{name}: {text}".split() for name, text in shown.items()
    ]

    exported = json.loads(export(at, "JSON"))
    again = httpx.post(f"{url}/compare", json=exported["request"], timeout=60, trust_env=False).json()
    for answer in (again, exported["response"]):
        assert {arm["name"]: arm["results"][0]["text"].strip() for arm in answer["arms"]} == shown
    assert exported["request"]["arms"][1]["steering"][0]["checkpoint"] == "demo@v1", "versions are named"


def test_colours_are_kept(at: Opened) -> None:
    at.page.get_by_role("button", name="Colours: auto").click()
    at.page.get_by_role("button", name="Colours: light").click()
    at.page.reload()
    expect(at.page.get_by_role("button", name="Colours: dark")).to_be_visible()
    assert at.page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
