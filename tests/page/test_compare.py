"""Arms side by side, and what was done to each token."""

import re
from typing import Any

import httpx
import pytest

from tests.page.conftest import Cable, Opened, compare

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.page
ALL = {"truthfulness": 1, "civility": 1, "fairness": 1}


def slider(at: Opened, name: str, arm: str = "steered") -> Any:
    return at.arm(arm).get_by_role("slider", name=name, exact=True)


def test_who_comes_for_the_first_time_sees_two_answers_after_one_click(url: str, at: Opened) -> None:
    at.run()
    (asked,) = at.bodies("/compare")
    assert asked["stream"]
    assert asked["arms"] == [{"name": "baseline", "attributes": {}}, {"name": "steered", "attributes": ALL}]
    answer = compare(url, asked)
    assert {name: at.text(name) for name in answer} == {name: arm["text"].strip() for name, arm in answer.items()}
    assert at.text("baseline") != at.text("steered")


def test_all_arms_stream_at_once_from_one_call(cable: Cable, open_page: Any) -> None:
    at: Opened = open_page(cable.url)
    at.page.get_by_role("button", name="truthfulness alone").click()
    at.page.get_by_role("button", name="steered away").click()
    arms = at.page.locator(".arm")
    expect(arms).to_have_count(4)
    tokens = [arms.nth(index).locator(".tok") for index in range(4)]
    cable.enough = 12_000  # bytes, of some 40,000
    cable.flows.clear()
    with at.answered():
        at.page.get_by_role("button", name="Run", exact=True).click()
        for of_arm in tokens:
            expect(of_arm.first).to_be_visible()
        seen = [of_arm.count() for of_arm in tokens]
        cable.flows.set()
    assert len(at.bodies("/compare")) == 1
    ends = [of_arm.count() for of_arm in tokens]
    assert all(0 < count < end for count, end in zip(seen, ends, strict=True)), "all arms were growing together"


def test_a_slider_has_the_range_and_the_default_of_the_checkpoint(url: str, at: Opened) -> None:
    (entry, *_) = httpx.get(f"{url}/checkpoints", trust_env=False).json()["checkpoints"]
    for name, attribute in entry["attributes"].items():
        one = slider(at, name)
        given = [float(one.get_attribute(which)) for which in ("min", "max")]
        assert given == attribute["range"]
        assert float(one.input_value()) == attribute["default"]
    expect(at.arm("steered").get_by_role("button", name="truthfulness: 0", exact=True)).to_be_visible()


def test_a_moved_slider_asks_again_and_a_double_click_goes_back(at: Opened) -> None:
    at.run()
    before = at.text("steered")
    with at.answered():
        slider(at, "civility").fill("-2")
    assert at.bodies("/compare")[-1]["arms"][1]["attributes"] == ALL | {"civility": -2}
    assert at.text("steered") != before
    expect(at.arm("steered").locator(".verdicts .bad")).to_have_text(re.compile("civility"))
    with at.answered():
        slider(at, "civility").dblclick()
    assert float(slider(at, "civility").input_value()) == 1
    assert at.text("steered") == before
    with at.answered():
        slider(at, "civility").press("0")
    assert at.bodies("/compare")[-1]["arms"][1]["attributes"] == ALL | {"civility": 0}
    at.page.get_by_role("switch", name="Run as sliders move").uncheck()
    asked = len(at.bodies("/compare"))
    slider(at, "civility").press("Delete")
    at.page.wait_for_timeout(400)
    assert len(at.bodies("/compare")) == asked


def test_a_token_shows_what_was_done_to_it(url: str, at: Opened) -> None:
    at.run()
    answer = compare(url, at.bodies("/compare")[0])["steered"]
    index = answer["comparison"]["first_divergence"]
    token = at.arm("steered").locator(f".tok[data-at='{index}']")
    assert token.evaluate("one => getComputedStyle(one).backgroundImage").count("gradient") == 3
    token.hover()
    card = at.page.locator(".token-card")
    row = card.get_by_role("row", name=re.compile("civility"))
    column = next(one for one in answer["trace"][index]["columns"] if one["attribute"] == "civility")
    cells = [float(cell.replace("−", "-")) for cell in row.get_by_role("cell").all_text_contents()]
    expected = [column["gate"], column["strength"], column["delta_norm"], column["cosine"]]
    assert cells == pytest.approx(expected, abs=0.51 if column["delta_norm"] > 100 else 0.06)
    assert cells[0] == pytest.approx(column["gate"], abs=0.006)
    likely = answer["logprobs"][index]["top"]
    assert card.locator(".tops code").all_text_contents()[: len(likely)] == [
        one["token"].replace(" ", "␣") for one in likely
    ]
    expect(card).to_contain_text("The baseline has")
    at.page.mouse.move(5, 5)
    expect(card).to_be_hidden()


def test_strips_show_the_strength_and_gates_on_request(at: Opened) -> None:
    at.run()
    first = at.arm("baseline").locator(".tok").first
    unsteered = first.evaluate("one => one.style.backgroundImage")
    at.page.get_by_role("button", name="Gates").click()
    expect(at.page.get_by_role("button", name="Gates")).to_have_attribute("aria-pressed", "true")
    assert first.evaluate("one => one.style.backgroundImage") != unsteered, "the baseline's gates open, too"
    at.page.get_by_role("button", name="Steering").click()
    with at.answered():
        slider(at, "fairness").fill("-1")
    striped = at.arm("steered").locator(".tok").first.evaluate("one => one.style.backgroundImage")
    assert striped.count("repeating") == 1, "away is striped"


def test_the_first_divergence_is_marked_before_its_token(url: str, at: Opened) -> None:
    at.run()
    index = compare(url, at.bodies("/compare")[0])["steered"]["comparison"]["first_divergence"]
    marks = at.arm("steered").locator(".divergence")
    expect(marks).to_have_count(1)
    assert marks.evaluate("one => one.nextElementSibling.dataset.at") == str(index)
    expect(at.arm("baseline").locator(".divergence")).to_have_count(0)


def test_the_summary_has_the_servers_numbers_and_explains_them_on_the_spot(url: str, at: Opened) -> None:
    at.run()
    answer = compare(url, at.bodies("/compare")[0])["steered"]
    card = at.arm("steered")
    shown = dict(
        zip(card.locator(".stat dt").all_text_contents(), card.locator(".stat dd").all_text_contents(), strict=True)
    )
    gates = [one["gate"] for token in answer["trace"] for one in token["columns"] if one["strength"]]
    assert shown["steered tokens"] == f"{answer['steering']['steered_tokens']} / {len(answer['token_ids'])}"
    assert float(shown["mean gate"]) == pytest.approx(sum(gates) / len(gates), abs=0.006)
    assert float(shown["KL / token"]) == pytest.approx(answer["comparison"]["kl_per_token"], abs=0.006)
    assert float(shown["perplexity ratio"].rstrip("×")) == pytest.approx(
        answer["comparison"]["perplexity_ratio"], abs=0.006
    )
    assert float(shown["tokens / s"]) > 0
    for term in shown:
        card.get_by_role("button", name=term, exact=True).click()
        expect(card.locator(".explanation")).to_be_visible()
        assert len(card.locator(".explanation").text_content()) > 40
    expect(card).to_contain_text("by demo@v1")


def test_a_run_without_a_trace_says_what_it_does_not_know(url: str, at: Opened, open_page: Any) -> None:
    at.page.get_by_role("switch", name="Trace").uncheck()
    at.run()
    (asked,) = at.bodies("/compare")
    assert asked["trace"] is False
    answer = compare(url, asked)
    assert at.text("steered") == answer["steered"]["text"].strip()
    assert answer["steered"]["trace"] is None
    card = at.arm("steered")
    stats = dict(
        zip(card.locator(".stat dt").all_text_contents(), card.locator(".stat dd").all_text_contents(), strict=True)
    )
    assert stats["mean gate"] == "no trace"
    assert float(stats["KL / token"]) > 0, "what needs no trace is there"
    card.get_by_role("button", name="mean gate", exact=True).click()
    expect(card.locator(".explanation")).to_contain_text("needs a trace")
    token = card.locator(".tok").first
    assert token.evaluate("one => one.style.backgroundImage") == ""
    token.click()
    expect(at.page.locator(".token-card")).to_contain_text("Run without a trace")
    at.page.keyboard.press("Escape")
    at.page.wait_for_timeout(400)
    other: Opened = open_page(at.page.url)
    expect(other.page.get_by_role("switch", name="Trace")).not_to_be_checked()
    other.page.get_by_role("navigation").get_by_role("button", name="Dose-response").click()
    for label, value in (("Steps", "2"), ("Answers each", "1")):
        other.page.get_by_label(label, exact=True).fill(value)
    with other.answered():
        other.page.get_by_role("button", name="Measure").click()
    expect(other.page.locator(".chart")).to_have_count(2)
    expect(other.page.get_by_text("the mean gate needs one")).to_be_visible()
    at.page.get_by_role("switch", name="Trace").check()
    at.run()
    assert float(card.locator(".stat dd").nth(1).text_content()) > 0


def test_arms_are_added_renamed_duplicated_and_removed(at: Opened) -> None:
    at.page.get_by_role("button", name="civility alone").click()
    name = at.arm("civility alone").get_by_role("textbox", name="Name of the arm")
    name.fill("polite")
    name.press("Enter")
    at.page.get_by_role("button", name="Duplicate polite").click()
    at.page.get_by_role("button", name="Remove steered").click()
    at.page.get_by_role("button", name="steer it").first.click()
    at.run()
    asked = at.bodies("/compare")[0]["arms"]
    assert [arm["name"] for arm in asked] == ["baseline", "polite", "polite 2"]
    assert asked[0]["attributes"] == ALL
    assert asked[1]["attributes"] == asked[2]["attributes"] == {"truthfulness": 0, "civility": 1, "fairness": 0}


def test_an_arm_takes_several_checkpoints(url: str, at: Opened) -> None:
    at.arm("steered").get_by_role("button", name="another checkpoint").click()
    at.run()
    first, second = at.bodies("/compare")[0]["arms"][1]["steering"]
    assert (first, second) == ({"attributes": ALL}, {"checkpoint": "demo@v2", "attributes": ALL})
    expect(at.arm("steered")).to_contain_text("by demo@v1 and demo@v2")


def test_a_conversation_of_several_turns_goes_through_the_template(url: str, at: Opened) -> None:
    at.page.get_by_role("button", name="Chat", exact=True).click()
    at.run()
    answer = at.text("steered")
    at.arm("steered").get_by_role("button", name="Go on with this answer").click()
    at.page.get_by_role("textbox", name="Turn 3, user").fill("What sound does a cow make?")
    at.run()
    assert at.bodies("/compare")[-1]["messages"] == [
        {"role": "user", "content": "What is the capital of Japan?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "What sound does a cow make?"},
    ]
    assert "moo" in at.text("steered")


def test_sampling_settings_reach_the_server(at: Opened) -> None:
    at.page.get_by_text("Sampling", exact=False).first.click()
    for label, value in (("Temperature", "0"), ("Longest answer", "5"), ("Top k", "3"), ("Seed", "")):
        at.page.get_by_label(label, exact=True).fill(value)
    at.page.get_by_label("Stop texts, one a line").fill("\\n\nQ:")
    at.run()
    asked = at.bodies("/compare")[0]
    assert (asked["temperature"], asked["max_new_tokens"], asked["top_k"], asked["stop"]) == (0, 5, 3, ["\n", "Q:"])
    expect(at.page.locator(".seed")).to_have_text(f"seed {asked['seed']}"), "drawn, and shown"
    expect(at.arm("steered")).to_contain_text("cut at the longest that was asked for")


def test_nothing_jumps_while_answers_stream(at: Opened) -> None:
    at.run()
    before = at.page.locator(".summary").first.bounding_box()
    at.page.evaluate(
        """() => {
          window.lowest = window.highest = document.querySelector('.summary').getBoundingClientRect().top;
          const look = () => {
            const top = document.querySelector('.summary')?.getBoundingClientRect().top ?? 0;
            window.lowest = Math.min(window.lowest, top);
            window.highest = Math.max(window.highest, top);
            requestAnimationFrame(look);
          };
          look();
        }"""
    )
    at.run()
    assert at.page.evaluate("[window.lowest, window.highest]") == [before["y"], before["y"]]


def test_generated_text_is_never_html_and_right_to_left_is_marked(at: Opened) -> None:
    at.page.get_by_label("Prompt", exact=True).fill("<img src=x onerror=alert(1)> שלום")
    expect(at.page.get_by_label("Prompt", exact=True)).to_have_attribute("dir", "auto")
    at.page.get_by_role("button", name="Run", exact=True).click()
    expect(at.arm("steered").locator(".provenance")).to_contain_text("by demo@v1")
    expect(at.arm("steered").locator(".answer")).to_have_attribute("dir", "auto")
    expect(at.page.locator("main img")).to_have_count(0)
