"""Pictures of the page: `make screenshots`. docs/page.png is the README's; those of every view are to be looked at."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.page.conftest import CHROMIUM, QUIET, ROOT, server

SIZES = {1440: 900, 390: 844}


def run(page: Page) -> None:
    with page.expect_response(lambda response: response.url.endswith("/judge")):
        page.get_by_role("button", name="Run", exact=True).click()
    page.locator(".verdicts").nth(1).wait_for()


def view(page: Page, name: str) -> None:
    page.get_by_role("navigation").get_by_role("button", name=name).click()


def hero(page: Page) -> None:
    """What a first run shows, with the numbers of the token that decides."""
    page.get_by_role("button", name="truthfulness alone").click()
    run(page)
    token = page.get_by_role("article", name="Arm truthfulness alone").locator(".tok[data-at='11']")  # "To" of Tokyo
    token.hover()
    page.locator(".token-card").wait_for()


def every_view(page: Page, shoot: Any) -> None:
    shoot("first")
    page.get_by_role("button", name="steered away").click()
    run(page)
    page.mouse.move(0, 0)
    shoot("compare", full_page=True)
    token = page.get_by_role("article", name="Arm steered", exact=True).locator(".tok").first
    token.click()
    shoot("token")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_text("Sampling", exact=False).first.click()
    page.get_by_role("button", name="Go on with this answer").first.click()
    page.get_by_label("Temperature", exact=True).fill("-1")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("alert").wait_for()
    shoot("chat", full_page=True)
    page.get_by_label("Temperature", exact=True).fill("1")
    page.get_by_role("button", name="Prompt", exact=True).click()
    view(page, "Dose-response")
    with page.expect_response(lambda response: response.url.endswith("/judge"), timeout=120_000):
        page.get_by_role("button", name="Measure").click()
    page.locator(".chart").nth(2).locator("circle").first.wait_for()
    shoot("dose", full_page=True)
    view(page, "Checkpoints")
    page.locator(".gates").first.wait_for()
    shoot("checkpoints", full_page=True)
    view(page, "Blind A/B")
    page.get_by_role("button", name="First pair").click()
    page.locator(".blind article").first.get_by_role("button").click()
    page.get_by_role("region", name="Studies").wait_for()
    shoot("blind", full_page=True)
    for name in ("History", "Share and export"):
        page.get_by_role("button", name=name).click()
        shoot(name.split()[0].lower())
        page.keyboard.press("Escape")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/screenshots")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/page.png")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(studies=str(Path(folder) / "studies.db"), remember="false") as url,
        sync_playwright() as running,
    ):
        browser = running.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 830}, color_scheme="light")
        page.goto(url)
        hero(page)
        page.screenshot(path=given.picture)
        for width, height in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(url)
                page.locator(".arm").nth(1).wait_for()

                def shoot(name: str, page: Page = page, scheme: str = scheme, **options: Any) -> None:
                    page.wait_for_timeout(150)  # past the transitions
                    page.screenshot(path=given.out / f"{name}-{page.viewport_size['width']}-{scheme}.png", **options)

                every_view(page, shoot)
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
