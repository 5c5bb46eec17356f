"""What goes wrong is shown where it is, nothing that was typed is lost, and trying again works."""

from typing import Any

import httpx
import pytest

from tests.page.conftest import KEY, Cable, Opened
from tests.server.conftest import event_lines

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.page


def prompt(at: Opened) -> Any:
    return at.page.get_by_label("Prompt", exact=True)


def run(at: Opened) -> None:
    at.page.get_by_role("button", name="Run", exact=True).click()


def test_a_prompt_that_is_too_long_is_told_at_the_prompt(at: Opened) -> None:
    at.run()
    answer = at.text("steered")
    text = "Q: What is the capital of Japan? A: " * 60
    prompt(at).fill(text)
    run(at)
    problem = at.page.locator(".prompt-card").get_by_role("alert")
    expect(problem).to_contain_text("more than the context holds")
    assert prompt(at).input_value() == text
    expect(prompt(at)).to_have_attribute("aria-invalid", "true")
    assert at.text("steered") == answer, "what was there stays"
    prompt(at).fill("Q: What is the capital of Japan? A:")
    with at.answered():
        problem.get_by_role("button", name="Try again").click()
    expect(problem).to_be_hidden()


def test_a_context_that_is_full_is_told_under_the_answer(url: str, at: Opened) -> None:
    text = "Q: What is the capital of Japan? A: With" + " pleasure," * 300
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": text}, trust_env=False).json()
    cut = httpx.post(
        f"{url}/detokenize", json={"tokens": tokens["tokens"][: tokens["max_model_len"] - 2]}, trust_env=False
    )
    prompt(at).fill(cut.json()["prompt"])
    run(at)
    expect(at.arm("steered").locator(".provenance")).to_contain_text("the context is full")


def test_a_field_that_is_refused_is_named(at: Opened) -> None:
    at.page.get_by_text("Sampling", exact=False).first.click()
    at.page.get_by_label("Temperature", exact=True).fill("-1")
    run(at)
    problem = at.page.get_by_role("alert")
    expect(problem).to_contain_text("temperature")
    at.page.get_by_label("Temperature", exact=True).fill("0")
    with at.answered():
        problem.get_by_role("button", name="Try again").click()


def test_an_arm_with_what_the_checkpoint_does_not_have_says_so(at: Opened) -> None:
    at.arm("steered").get_by_label("Multiplier of civility").fill("99")
    at.arm("steered").get_by_label("Multiplier of civility").press("Tab")
    expect(at.arm("steered").get_by_role("alert")).to_contain_text("civility")


def test_a_lost_connection_keeps_what_came_and_can_be_tried_again(cable: Cable, open_page: Any) -> None:
    at: Opened = open_page(cable.url)
    at.page.locator(".arm").nth(1).wait_for()
    cable.flows.clear()
    run(at)
    at.arm("steered").locator(".tok").first.wait_for()
    cable.cut()
    problem = at.page.get_by_role("alert")
    expect(problem).to_contain_text("The connection was lost")
    assert at.text("steered"), "the tokens that came are shown"
    expect(at.arm("steered").locator(".provenance")).to_have_text("interrupted")
    with at.answered():
        problem.get_by_role("button", name="Try again").click()
    expect(problem).to_be_hidden()
    expect(at.arm("steered").locator(".provenance")).to_contain_text("by demo@v1")


def test_a_server_that_is_gone_is_told(cable: Cable, open_page: Any) -> None:
    at: Opened = open_page(cable.url)
    at.page.locator(".arm").nth(1).wait_for()
    at.page.context.set_offline(True)
    run(at)
    problem = at.page.get_by_role("alert")
    expect(problem).to_contain_text("cannot be reached")
    at.page.context.set_offline(False)
    with at.answered():
        problem.get_by_role("button", name="Try again").click()


def test_an_answer_can_be_stopped(cable: Cable, open_page: Any) -> None:
    at: Opened = open_page(cable.url)
    at.page.locator(".arm").nth(1).wait_for()
    cable.flows.clear()
    run(at)
    at.page.locator(".tok").first.wait_for()
    at.page.get_by_role("button", name="Stop").click()
    expect(at.arm("steered").locator(".provenance")).to_have_text("stopped")
    cable.flows.set()
    at.run()
    expect(at.arm("steered").locator(".provenance")).to_contain_text("by demo@v1")


def test_a_key_is_asked_for_and_a_full_queue_is_told(guarded: str, open_page: Any) -> None:
    at: Opened = open_page(guarded)
    at.page.get_by_label("API key").fill("wrong")
    at.page.get_by_role("button", name="Go on").click()
    expect(at.page.get_by_label("API key")).to_be_visible()
    at.page.get_by_label("API key").fill(KEY)
    at.page.get_by_role("button", name="Go on").click()
    at.run()
    assert KEY not in at.page.url
    answer = at.text("steered")
    long = {"prompt": "a", "n": 3, "max_new_tokens": 480, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{guarded}/generate", json=long, headers=headers, timeout=60, trust_env=False) as other:
        lines = event_lines(other)
        next(lines)
        run(at)
        problem = at.page.get_by_role("alert")
        expect(problem).to_contain_text("The queue is full")
        expect(problem).to_contain_text("s of patience")
        assert at.text("steered") == answer
    with at.answered():
        problem.get_by_role("button", name="Try again").click()
    expect(problem).to_be_hidden()
    at.page.get_by_role("button", name="Share and export").click()
    expect(at.page.locator("pre.code")).to_contain_text("$MATSTEER_API_KEY")
