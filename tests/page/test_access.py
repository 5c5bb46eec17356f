"""For everybody: keyboard, screen reader, colours, small screens."""

from typing import Any

import pytest

from tests.page.conftest import Opened

expect = pytest.importorskip("playwright.sync_api").expect
axe = pytest.importorskip("axe_playwright_python.base")
pytestmark = pytest.mark.page
VIEWS = ["Compare", "Dose-response", "Checkpoints", "Blind A/B"]
AXE = {
    "resultTypes": ["violations"],
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
}


def faults(at: Opened) -> list[str]:
    """What axe-core finds, apart from what is minor."""
    at.page.evaluate(axe.AXE_FILE_PATH.read_text(encoding="utf-8"))
    found = at.page.evaluate("options => axe.run(document, options)", AXE)
    return [
        f"{one['id']}: {node['html'][:120]}"
        for one in found["violations"]
        if one["impact"] != "minor"
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_in_any_view(url: str, open_page: Any, scheme: str) -> None:
    at: Opened = open_page(url, color_scheme=scheme)
    at.page.locator(".arm").nth(1).wait_for()
    at.page.get_by_text("Sampling", exact=False).first.click()
    at.run()
    at.arm("steered").get_by_role("button", name="mean gate").click()
    at.arm("steered").locator(".tok").nth(2).click()
    assert faults(at) == []
    at.page.keyboard.press("Escape")
    for name in VIEWS[1:]:
        at.page.get_by_role("navigation").get_by_role("button", name=name).click()
        at.page.locator("main .card").first.wait_for()
        if name == "Dose-response":
            at.page.get_by_label("Steps", exact=True).fill("2")
            at.page.get_by_label("Answers each", exact=True).fill("1")
            with at.answered():
                at.page.get_by_role("button", name="Measure").click()
        if name == "Checkpoints":
            at.page.locator(".gates").first.wait_for()
        assert faults(at) == [], name
    for name in ("History", "Share and export"):
        at.page.get_by_role("button", name=name).click()
        assert faults(at) == [], name
        at.page.keyboard.press("Escape")


def test_the_page_works_with_the_keyboard_alone(at: Opened) -> None:
    with at.answered():
        at.page.keyboard.press("Control+Enter")
    answer = at.arm("steered").get_by_role("group", name="Answer of steered")
    answer.focus()
    at.page.keyboard.press("ArrowRight")
    at.page.keyboard.press("ArrowRight")
    card = at.page.locator(".token-card")
    expect(card).to_contain_text("token 2 of steered")
    at.page.keyboard.press("End")
    last = at.arm("steered").locator(".tok").count()
    expect(card).to_contain_text(f"token {last} of steered")
    at.page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    slider = at.arm("steered").get_by_role("slider", name="civility", exact=True)
    slider.focus()
    with at.answered():
        at.page.keyboard.press("ArrowLeft")
    assert float(slider.input_value()) == 0.9
    at.page.get_by_role("link", name="To the content").focus()
    at.page.keyboard.press("Enter")
    assert at.page.evaluate("document.activeElement.id") == "main"


def test_a_screen_reader_is_told_the_answers_when_they_are_there(at: Opened) -> None:
    at.run()
    told = at.page.locator("#app > .sr-only[role=status]")
    expect(told).to_contain_text(f"baseline:  {at.text('baseline')}".replace("  ", " "))
    expect(told).to_contain_text(at.text("steered"))


def test_a_phone_shows_everything_without_scrolling_sideways(url: str, open_page: Any) -> None:
    at: Opened = open_page(url, width=390, height=844, has_touch=True, is_mobile=True)
    at.page.locator(".arm").nth(1).wait_for()
    at.run()
    for name in VIEWS:
        at.page.get_by_role("navigation").get_by_role("button", name=name).click()
        at.page.locator("main .card, main .arm").first.wait_for()
        assert at.page.evaluate("document.documentElement.scrollWidth") <= 390, name
    at.page.get_by_role("navigation").get_by_role("button", name="Compare").click()
    at.arm("steered").locator(".tok").nth(3).tap()
    card = at.page.locator(".token-card")
    expect(card).to_contain_text("token 4 of steered")
    box = card.bounding_box()
    assert (box["x"], round(box["y"] + box["height"])) == (0, 844), "a sheet at the lower edge"
    card.get_by_role("button", name="Close").click()
    expect(card).to_be_hidden()
