"""The page of ``edgellm serve`` in a real browser: the devices, and an answer that goes on.

Needs playwright and a Chromium of the system (EDGELLM_BROWSER, or one on the PATH); skipped where
they are missing. With EDGELLM_SCREENSHOTS=FOLDER it leaves pictures there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgellm.answer import LoadOptions
from edgellm.client import Cluster
from edgellm.discovery.addresses import parse_address
from edgellm.loaded import LoadedModel
from edgellm.localcluster import LocalCluster, LocalDevice, local_cluster, local_devices

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
service = pytest.importorskip("edgellm.api.service", reason="the extra `serve` is not installed")

MODEL = "stub:12:delay=0.01"
SPLIT = "a:0-4,b:4-8,c:8-12"
QUESTION = "Where do the tokens go?"
SHOWN_MS = 20_000
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 860}


def browser_path() -> str:
    """The browser to drive; skips the test where there is none."""
    told = os.environ.get("EDGELLM_BROWSER")
    found = told or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("there is no Chromium on the PATH; EDGELLM_BROWSER names one")
    return found


@contextlib.asynccontextmanager
async def started(count: int) -> AsyncIterator[tuple[Cluster, LocalCluster]]:
    """Devices a, b, c, ... and "desk", whose node is in this process, as in ``edgellm serve``."""
    devices = local_devices(count, memory_bytes=4 << 30, processors=range(count), pin=False)
    async with local_cluster(devices, own=LocalDevice("desk", memory_bytes=1 << 30)) as local:
        assert local.own is not None
        own = replace(local.own, peers=tuple(map(parse_address, local.addresses)))
        async with Cluster.connect(local.addresses, local=own) as cluster:
            yield cluster, local


@contextlib.asynccontextmanager
async def served(
    cluster: Cluster, home: Path, split: str = SPLIT, key: str | None = None
) -> AsyncIterator[str]:
    """The address of a server over the cluster."""

    @contextlib.asynccontextmanager
    async def load(reference: str) -> AsyncIterator[LoadedModel]:
        options = LoadOptions(stages=split, exact=True, context=256)
        async with cluster.load(reference, options) as model:
            yield model

    settings = service.ServiceSettings(home=home, port=0, key=key)
    async with service.service(settings, load, {"stub": MODEL}, cluster=cluster) as running:
        await running.models.get("stub")
        yield running.url


def is_fault(said: Any) -> bool:
    """Whether a line of the console tells of one. A key that is asked for is none."""
    return said.type == "error" and "401 (Unauthorized)" not in said.text


@contextlib.asynccontextmanager
async def browser_page(url: str, size: dict[str, int], **how: Any) -> AsyncIterator[Any]:
    """The page, opened; fails if a script of it failed or it asked for anything from elsewhere."""
    path = browser_path()
    async with playwright.async_playwright() as driver:
        # The sandbox of the browser does not start as root, and the page is our own.
        browser = await driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = await browser.new_page(viewport=size, **how)
            failed: list[str] = []
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.on(
                "console",
                lambda said: failed.append(said.text) if is_fault(said) else None,
            )
            page.on(
                "request",
                lambda asked: None if asked.url.startswith(url) else failed.append(asked.url),
            )
            await page.goto(f"{url}/")
            yield page
            assert not failed
        finally:
            await browser.close()


async def picture(page: Any, name: str) -> None:
    folder = os.environ.get("EDGELLM_SCREENSHOTS")
    if folder:
        await page.screenshot(path=str(Path(folder) / f"{name}.png"))


async def test_a_device_dies_and_the_page_shows_it_while_the_answer_goes_on(
    tmp_path: Path,
) -> None:
    browser_path()
    async with (
        started(4) as (cluster, local),
        served(cluster, tmp_path) as url,
        browser_page(url, DESK) as page,
    ):
        cards = page.locator("#pipeline .device")
        await playwright.expect(cards).to_have_count(3, timeout=SHOWN_MS)
        await playwright.expect(cards.nth(1)).to_contain_text("layers 4 to 7")
        await playwright.expect(page.locator("#spare .device")).to_have_count(2)
        await playwright.expect(page.locator("#pipeline .link").first).to_contain_text(
            "/s", timeout=SHOWN_MS
        )
        await page.get_by_label("Your message").fill(QUESTION)
        await page.keyboard.press("Enter")
        answer = page.locator(".message.assistant .text")
        await playwright.expect(answer).not_to_be_empty(timeout=SHOWN_MS)
        await picture(page, "page-answering")
        before = await answer.inner_text()
        local.node("b").process.kill()
        gone = page.locator("#events li", has_text="b is gone")
        await playwright.expect(gone).to_have_count(1, timeout=SHOWN_MS)
        await picture(page, "page-device-gone")
        await playwright.expect(page.locator(".message.assistant .after")).to_contain_text(
            "tokens", timeout=60_000
        )
        after = await answer.inner_text()
        assert after.startswith(before.rstrip())
        assert len(after) > len(before)
        await playwright.expect(page.locator("#strip")).not_to_have_attribute("aria-label", "b has")


async def test_by_keyboard_on_a_phone_in_the_dark_with_a_key(tmp_path: Path) -> None:
    """One device is enough here; what is tested is the page."""
    browser_path()
    key = "sk-edgellm-of-this-test"
    async with (
        started(1) as (cluster, _),
        served(cluster, tmp_path, "a:0-12", key) as url,
        browser_page(url, PHONE, color_scheme="dark", reduced_motion="reduce") as page,
    ):
        dialog = page.get_by_role("dialog", name="This server wants its key")
        await playwright.expect(dialog).to_be_visible(timeout=SHOWN_MS)
        await page.keyboard.type(key)
        await page.keyboard.press("Enter")
        await playwright.expect(page.get_by_role("status").first).to_contain_text(
            "stub on", timeout=SHOWN_MS
        )
        await playwright.expect(page.get_by_role("img", name="stub: a has layers")).to_be_visible()
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], "nothing is cut off at the side"
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(16, 21, 27)"
        await page.keyboard.press("Tab")  # from the top: the first thing is the way to the chat
        await page.get_by_role("textbox", name="Your message").focus()
        await page.keyboard.type(QUESTION)
        await page.keyboard.press("Enter")
        answer = page.locator(".message.assistant")
        await playwright.expect(answer.locator(".text")).not_to_be_empty(timeout=SHOWN_MS)
        await page.keyboard.press("Escape")
        await playwright.expect(answer.locator(".after")).to_have_text("Stopped.")
        await picture(page, "page-phone")
