"""Dose-response, checkpoints, and blind comparisons."""

import base64
import csv
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.page.conftest import ADMIN, Cable, Opened, compare

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.page


def view(at: Opened, name: str) -> None:
    at.page.get_by_role("navigation").get_by_role("button", name=name).click()


def linked(url: str, dose: dict[str, Any]) -> str:
    """An address that somebody else has made."""
    state = {"prompt": "Q: What is the capital of Japan? A:", "arms": [{"name": "baseline", "parts": []}], "dose": dose}
    return f"{url}/#dose={base64.urlsafe_b64encode(json.dumps(state).encode()).decode().rstrip('=')}"


def test_an_axis_of_a_link_is_within_what_the_page_can_ask(url: str, open_page: Any) -> None:
    dose = {"arm": "gone", "attribute": "truthfulness", "from": 0, "to": 0.001, "steps": 3.2, "samples": -5}
    at: Opened = open_page(linked(url, dose))
    expect(at.page.get_by_label("Answers each", exact=True)).to_have_value("1")
    with at.answered():
        at.page.get_by_role("button", name="Measure").click()
    asked = at.bodies("/compare")[0]["arms"][1:]
    assert [arm["attributes"] for arm in asked] == [{"truthfulness": value} for value in (0, 0.0005, 0.001)]
    other: Opened = open_page(linked(url, dose | {"attribute": "kindness", "steps": 1e9, "samples": 1e9}))
    expect(other.page.get_by_role("region", name="The axis").locator("select").first).to_have_value("truthfulness")
    expect(other.page.get_by_label("Steps", exact=True)).to_have_value("9"), "an axis of its own, not the link's"


def test_an_attribute_of_a_checkpoint_that_is_not_active_is_an_axis(url: str, open_page: Any, browser: Any) -> None:
    context = browser.new_context()

    def without_fairness(route: Any) -> None:
        answer = route.fetch()
        listing = answer.json()
        for one in listing["checkpoints"]:
            if one["active"]:
                del one["attributes"]["fairness"]
        route.fulfill(response=answer, json=listing)

    context.route("**/checkpoints", without_fairness)
    at: Opened = open_page(linked(url, {}), context=context)
    at.page.get_by_role("region", name="The axis").locator("select").first.select_option("fairness")
    for label, value in (("Steps", "2"), ("Answers each", "1")):
        at.page.get_by_label(label, exact=True).fill(value)
    with at.answered():
        at.page.get_by_role("button", name="Measure").click()
    steered = at.bodies("/compare")[0]["arms"][1:]
    assert {arm["checkpoint"] for arm in steered} == {"demo@v2"}
    assert [arm["attributes"] for arm in steered] == [{"fairness": -2}, {"fairness": 2}]
    context.close()


def test_one_multiplier_becomes_an_axis(url: str, at: Opened) -> None:
    view(at, "Dose-response")
    for label, value in (("From", "-1"), ("To", "1"), ("Steps", "3"), ("Answers each", "2")):
        at.page.get_by_label(label, exact=True).fill(value)
    with at.answered():
        at.page.get_by_role("button", name="Measure").click()
    (asked,) = at.bodies("/compare")
    assert [arm["attributes"] for arm in asked["arms"]] == [{}, *({"truthfulness": value} for value in (-1, 0, 1))]
    assert asked["n"] == 2
    expect(at.page.locator(".chart").last.locator("circle").first).to_be_visible()
    expect(at.page.locator(".chart")).to_have_count(3)
    arms = list(compare(url, asked).values())[1:]
    rows = at.page.locator("table.answers tbody tr")
    for index, arm in enumerate(arms):
        row = rows.nth(index)
        expect(row.locator(".text")).to_have_text(arm["results"][0]["text"].strip(), use_inner_text=True)
        gates = [
            one["gate"]
            for result in arm["results"]
            for token in result["trace"]
            for one in token["columns"]
            if one["attribute"] == "truthfulness"
        ]
        cells = row.get_by_role("cell").all_text_contents()
        assert float(cells[1]) == pytest.approx(sum(gates) / len(gates), abs=0.006)
        kl = sum(one["kl_per_token"] for one in arm["comparison"]) / 2
        assert float(cells[2].replace("<", "")) == pytest.approx(kl, abs=0.011)
    judged = at.page.locator("table.answers thead th").all_text_contents()
    truthful = judged.index("truthfulness") - 1
    assert [rows.nth(index).get_by_role("cell").nth(truthful).text_content() for index in (0, 2)] == ["0 %", "100 %"]


def test_more_texts_than_a_request_may_ask_for_are_told_before(at: Opened) -> None:
    view(at, "Dose-response")
    at.page.get_by_label("Steps", exact=True).fill("31")
    at.page.get_by_label("Answers each", exact=True).fill("16")
    expect(at.page.get_by_role("button", name="Measure")).to_be_disabled()
    expect(at.page.get_by_text("512 texts are more than the 256")).to_be_visible()


def test_a_checkpoints_card_is_shown(url: str, at: Opened) -> None:
    view(at, "Checkpoints")
    card = at.page.get_by_role("region", name="demo@v1")
    evaluation = httpx.get(f"{url}/checkpoints/demo", trust_env=False).json()["versions"][0]["evaluation"]
    rows = card.locator("table.measured tbody tr")
    expect(rows).to_have_count(len(evaluation["arms"]))
    for index, arm in enumerate(evaluation["arms"]):
        text = rows.nth(index).text_content()
        for metric in arm["metrics"].values():
            low, high = (f"{metric[end] * 100:.1f}" for end in ("low", "high"))
            assert f"{metric['value'] * 100:.1f}" in text
            assert f"[{low}, {high}]" in text
    expect(card.locator(".gates li")).to_have_count(3)
    card.get_by_text("How it was trained").click()
    expect(card.get_by_text("l_sparse")).to_be_visible()


def test_checkpoints_are_loaded_activated_and_unloaded_with_the_admin_key(url: str, at: Opened, open_page: Any) -> None:
    bystander: Opened = open_page(url)
    bystander.page.locator(".arm").nth(1).wait_for()
    view(at, "Checkpoints")
    two = at.page.get_by_role("region", name="demo@v2")
    try:
        two.get_by_role("button", name="Activate").click()
        dialog = at.page.get_by_role("dialog", name="The admin key")
        dialog.get_by_label("Admin key").fill("wrong")
        dialog.get_by_role("button", name="Activate").click()
        expect(dialog).to_contain_text("that key is not the one")
        dialog.get_by_label("Admin key").fill(ADMIN)
        dialog.get_by_role("button", name="Activate").click()
        expect(two.get_by_text("active", exact=True)).to_be_visible()
        expect(at.page.locator(".top .pill")).to_have_text("demo@v2")
        # Somebody else's page sees it, too.
        expect(bystander.page.locator(".notice")).to_contain_text("demo@v2 serves now")
        at.page.get_by_role("region", name="demo@v1").get_by_role("button", name="Activate").click()
        expect(at.page.locator(".top .pill")).to_have_text("demo@v1")
        two.get_by_role("button", name="Unload").click()
        expect(two.get_by_role("button", name="Load", exact=True)).to_be_visible()
        two.get_by_role("button", name="Load", exact=True).click()
        expect(two.get_by_text("loaded", exact=True)).to_be_visible()
    finally:
        activate(url, "v1")


def activate(url: str, version: str) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    answer = httpx.post(f"{url}/checkpoints/demo/activate", json={"version": version}, headers=headers, trust_env=False)
    assert answer.status_code == 200, answer.text


def test_a_swap_during_a_stream_is_shown(url: str, cable: Cable, open_page: Any) -> None:
    at: Opened = open_page(cable.url)
    at.page.locator(".arm").nth(1).wait_for()
    cable.flows.clear()
    try:
        at.page.get_by_role("button", name="Run", exact=True).click()
        at.page.locator(".tok").first.wait_for()
        activate(url, "v2")
        cable.flows.set()
        expect(at.page.locator(".top .pill")).to_have_text("demo@v2")
        told = at.arm("steered").locator(".provenance")
        expect(told).to_contain_text("by demo@v1")
        expect(told).to_contain_text("demo@v2 became active meanwhile")
    finally:
        activate(url, "v1")


def test_a_blind_vote_is_taken_and_which_was_which_shown_after_it(url: str, at: Opened, tmp_path: Path) -> None:
    view(at, "Blind A/B")
    at.page.get_by_label("Study", exact=True).fill("capitals")
    shown = set()
    for count in range(1, 4):
        at.page.get_by_role("button", name=re.compile("(First|Next) pair")).click()
        cards = at.page.locator(".blind article")
        expect(cards).to_have_count(2)
        assert "baseline" not in cards.first.text_content() + cards.last.text_content()
        if count < 3:
            cards.first.get_by_role("button").click()
        else:
            at.page.keyboard.press("0")
        expect(at.page.get_by_text("The vote is kept.")).to_be_visible()
        named = [cards.nth(index).locator(".badge").text_content().strip() for index in (0, 1)]
        assert sorted(named) == ["baseline", "steered"]
        shown.add(named[0])
        assert at.bodies("/studies/capitals/votes")[-1]["shown_first"] == ["baseline", "steered"].index(named[0])
    (study,) = httpx.get(f"{url}/studies", trust_env=False).json()["studies"]
    assert (study["votes"], study["ties"], study["arms"]) == (3, 1, ["baseline", "steered"])
    with at.page.expect_download() as saved:
        at.page.get_by_role("button", name="CSV").click()
    saved.value.save_as(tmp_path / "votes.csv")
    rows = list(csv.DictReader((tmp_path / "votes.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 3
    assert rows[2]["winner"] == "tie"
    assert {rows[0]["text_1"].strip(), rows[0]["text_2"].strip()} == {
        text.strip() for text in at.bodies("/studies/capitals/votes")[0]["texts"]
    }
