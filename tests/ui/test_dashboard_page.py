"""The dashboard in a real browser, over a service with fake engines."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shared.types import EngineState
from tests.fakes.busy_engine import BusyEngine
from tests.fakes.busy_service import busy_pool, busy_service, train
from tests.fakes.http_server import serving
from tests.fakes.pool import FakePool

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytestmark = pytest.mark.slow

TIMEOUT_MS = 20_000
DESKTOP = {"width": 1240, "height": 900}
PHONE = {"width": 390, "height": 844}
FAILED_REQUEST = "Failed to load resource"
"""What Chromium itself writes for answers of 400 and above, and for a server that is away."""


@asynccontextmanager
async def dashboard(
    browser: Browser, url: str, *, may_fail_requests: bool = False, **context: Any
) -> AsyncIterator[Page]:
    """The open page; at the end it must have reported no error."""
    problems: list[str] = []
    page = await browser.new_page(viewport=DESKTOP, **context)
    page.set_default_timeout(TIMEOUT_MS)

    def note(kind: str, text: str) -> None:
        if kind in ("error", "warning") and not (may_fail_requests and FAILED_REQUEST in text):
            problems.append(text)

    page.on("console", lambda message: note(message.type, message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    await page.goto(f"{url}/dashboard")
    yield page
    assert problems == []
    await page.close()


async def tile(page: Page, name: str) -> str:
    text = await page.locator(".tile", has_text=name).locator("dd").inner_text()
    return " ".join(text.split())


async def wait_for_text(page: Page, selector: str, pattern: str) -> None:
    await page.locator(selector, has_text=re.compile(pattern)).first.wait_for()


async def test_the_page_shows_a_training_run_and_keeps_up_with_it(
    browser: Browser, screenshots: Path
) -> None:
    pool = busy_pool()
    for engine in pool.members:
        assert isinstance(engine, BusyEngine)
        engine.born_s -= 60.0  # decisions of the past minute
    async with serving(busy_service(pool)) as url, dashboard(browser, url) as page:
        await wait_for_text(page, "#connection", "live")
        await wait_for_text(page, "#groups", "No rollout")
        await train(url, 9)
        await wait_for_text(page, "#push-now", "Version 9 is committed")
        assert await tile(page, "Weight version") == "9"
        await wait_for_text(page, "#pushes", "refused")
        await page.locator("#reward-chart .dot.green").first.wait_for()
        await page.locator("#kv-chart .band").first.wait_for()
        await page.locator("#kv-chart .limit").first.wait_for(state="attached")
        assert "50%" in await page.locator("#kv-chart .legend").inner_text()
        # Long enough for the charts to have a shape, and for figures to have changed.
        before = await tile(page, "Tokens per second")
        await page.wait_for_function(
            "before => !document.querySelector('.tile dd').innerText.startsWith(before)", arg=before
        )
        await asyncio.sleep(8)
        await page.locator("#groups button").nth(2).click()
        await wait_for_text(page, ".sample-facts", "of 48 drafted tokens accepted")
        await page.locator(".tokens").focus()
        await page.keyboard.press("ArrowRight")
        await wait_for_text(page, "#token-facts", r'Token 0: " ", logprob')
        shades = page.locator(".token-5")
        assert await shades.count() > 0
        await page.locator(".colours button", has_text="draft").click()
        await wait_for_text(page, "#token-view .legend", r"recovered: sampled where a draft")
        assert await page.locator(".tokens .origin-accepted").count() > 0
        assert await page.locator(".tokens .origin-recovered").count() > 0
        assert await shades.count() == 0
        await page.locator(".tokens").focus()
        await page.keyboard.press("ArrowRight")
        await wait_for_text(page, "#token-facts", r'Token 0: " ", .*, drafted and accepted')
        await page.mouse.move(0, 0)
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            await page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
            await _settled(page)
            await page.screenshot(path=screenshots / f"dashboard-{scheme}.png", full_page=True)
            await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
            await _settled(page)
            width = await page.evaluate("document.documentElement.scrollWidth")
            assert width <= PHONE["width"], "the page must not scroll sideways on a phone"
            name = f"dashboard-phone-{scheme}.png"
            await page.screenshot(path=screenshots / name, full_page=True)


async def test_a_killed_engine_is_shown_and_so_is_a_pool_without_engines(
    browser: Browser, screenshots: Path
) -> None:
    pool = busy_pool()
    async with serving(busy_service(pool)) as url, dashboard(browser, url) as page:
        await page.locator('.engine[data-engine="engine-1"]').wait_for()
        lost = pool.members.pop()
        lost.die("its process ended: killed by signal 9")
        pool.members.append(BusyEngine("engine-2", state=EngineState.STARTING))
        await wait_for_text(page, "#departed li.lost", "engine-1 was lost while serving.*signal 9")
        await page.locator('.engine[data-engine="engine-1"]').wait_for(state="detached")
        await wait_for_text(page, '.engine[data-engine="engine-2"]', "starting")
        assert await tile(page, "Engines ready") == "1 of 2"
        await page.screenshot(path=screenshots / "dashboard-killed.png")
        pool.members.clear()
        await wait_for_text(page, "#engines", "There is no engine; 2 should be there")
        await wait_for_text(page, "#kv-chart", "There is no engine")


async def test_buttons_act_and_show_what_the_server_answers(browser: Browser) -> None:
    pool = busy_pool(1)
    service = busy_service(pool)
    async with (
        serving(service) as url,
        dashboard(browser, url, may_fail_requests=True) as page,
    ):
        count = page.get_by_label("How many")
        await count.fill("3")
        await page.get_by_role("button", name="Scale").click()
        await wait_for_text(page, "#control-result.good", "3 engines are asked for")
        await page.locator('.engine[data-engine="engine-2"]').wait_for()
        await count.fill("9")
        await page.get_by_role("button", name="Scale").click()
        await wait_for_text(
            page, "#control-result.bad", r"count 9 is above engine\.max_count 4.*invalid_request"
        )
        await page.get_by_label("Mode").select_option("kv_gate")
        await page.get_by_label("KV threshold").fill("35")
        await page.get_by_role("button", name="Apply").click()
        await wait_for_text(page, "#control-result.good", "kv_gate, threshold 35.0%")
        assert service.speculation_policy.kv_cache_threshold == 0.35
        await wait_for_text(page, "#kv-hint", "Mode kv_gate")
        await page.get_by_role("button", name="Audit").click()
        await wait_for_text(page, "#control-result.good", "intact on 3 engines: 3 tensors equal")
        # Nothing pretends that the server could do what it cannot.
        offered = await page.locator("button:visible").all_inner_texts()
        assert ("Pause" in offered) == await _has_route(page, "/v1/pause")


async def test_actions_come_with_the_servers_routes(browser: Browser) -> None:
    pool = busy_pool(1)
    posted: list[tuple[str, str | None]] = []

    async def answer(route: Any) -> None:
        posted.append((route.request.url.partition("/v1/")[2], route.request.post_data))
        await route.fulfill(json={})

    async with serving(busy_service(pool)) as url:
        page = await browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        paths = {"/v1/pause", "/v1/resume", "/v1/engines/{engine_id}/drain"}
        document = {"paths": {path: {"post": {}} for path in paths}}
        await page.route("**/openapi.json", lambda route: route.fulfill(json=document))
        for path in ("pause", "resume", "engines/*/drain"):
            await page.route(f"**/v1/{path}", answer)
        page.on("dialog", lambda dialog: dialog.accept())
        await page.goto(f"{url}/dashboard")
        await page.get_by_label("On a pause").select_option("wait")
        await page.get_by_role("button", name="Pause", exact=True).click()
        await wait_for_text(page, "#control-result.good", "Done: pause")
        await page.get_by_role("button", name="Resume").click()
        await wait_for_text(page, "#control-result.good", "Done: resume")
        await page.get_by_role("button", name="Drain").click()
        await wait_for_text(page, "#control-result.good", "Done: drain engine-0")
        assert await page.get_by_role("button", name="Scale").count() == 0
        await page.close()
    assert posted == [
        ("pause", '{"mode":"wait"}'),
        ("resume", "{}"),
        ("engines/engine-0/drain", "{}"),
    ]


async def test_a_restarted_server_is_found_again_and_said_to_be_another(
    browser: Browser,
) -> None:
    pool = busy_pool(1)
    async with serving(busy_service(pool)) as url:
        page = await browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        await page.goto(f"{url}/dashboard")
        await wait_for_text(page, "#connection", "live")
    await wait_for_text(page, "#connection", "not connected")
    await wait_for_text(page, "#notices", "Not connected: .*Trying again in")
    port = int(url.rpartition(":")[2])
    async with serving(busy_service(FakePool([BusyEngine("engine-0")])), port=port):
        await wait_for_text(page, "#connection", "live")
        await wait_for_text(page, "#notices", "The server was started again")
        assert "Not connected" not in await page.locator("#notices").inner_text()
        await page.close()


async def test_a_server_with_keys_is_asked_with_the_key_of_this_tab(browser: Browser) -> None:
    refusal = {"error": {"code": "unauthorized", "type": "x", "message": "a key is needed"}}

    async def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret-1":
            await route.continue_()
        else:
            await route.fulfill(status=401, json=refusal)

    async with serving(busy_service(busy_pool(1))) as url:
        page = await browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        await page.route("**/v1/**", guard)
        await page.route("**/openapi.json", guard)
        await page.goto(f"{url}/dashboard")
        await wait_for_text(page, "#key-dialog", "a key is needed")
        await page.get_by_label("Key", exact=True).fill("secret-1")
        await page.get_by_role("button", name="Use it").click()
        await wait_for_text(page, "#connection", "live")
        await page.get_by_role("button", name="Scale").wait_for()
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0
        await page.close()


async def _settled(page: Page) -> None:
    """Charts are drawn again for the new width."""
    await page.wait_for_function(
        """() => [...document.querySelectorAll('.chart')].every(chart =>
             !chart.querySelector('svg[role=img]') ||
             Math.abs(chart.querySelector('svg[role=img]').viewBox.baseVal.width
                      - chart.clientWidth) <= 1)"""
    )


async def _has_route(page: Page, path: str) -> bool:
    document = await page.evaluate("fetch('openapi.json').then(answer => answer.json())")
    return path in document["paths"]
