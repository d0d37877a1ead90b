"""A recording of the dashboard while an engine dies and another comes in its place.

``python -m tests.ui.record_kill`` starts a real server with two engines of a tiny model, lets
clients ask for groups, kills the process that computes in one of them, and writes what Chromium
shows: an animated picture, and a sheet of its moments.
"""

from __future__ import annotations

import asyncio
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from PIL import Image, ImageDraw

from tests.chaos.engine_kills import EngineKillRun
from tests.chaos.engine_processes import core_of
from tests.ui.conftest import BROWSERS

if TYPE_CHECKING:
    from playwright.async_api import Page

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
SIZE = {"width": 1100, "height": 900}
INTERVAL_S = 1.5
BEFORE_S = 12.0
AFTER_S = 9.0
REPLACED_TIMEOUT_S = 120.0
FRAME_MS = 700
NUM_COLOURS = 64
SHEET_WIDTH = 720
"""Pixels of one moment."""
SHEET_COLUMNS = 2


class Recording:
    """Pictures of a page, each with what was going on."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.frames: list[tuple[str, Image.Image]] = []

    async def take(self, caption: str) -> None:
        """Now."""
        image = Image.open(io.BytesIO(await self._page.screenshot())).convert("RGB")
        ImageDraw.Draw(image).text((12, SIZE["height"] - 24), caption, fill=(200, 30, 30))
        self.frames.append((caption, image))

    async def keep_taking(self, until: float, caption: str) -> None:
        while time.monotonic() < until:
            await self.take(caption)
            await asyncio.sleep(INTERVAL_S)

    def save(self, directory: Path) -> list[Path]:
        """The animation and the sheet."""
        animation, sheet = directory / "dashboard-kill.gif", directory / "dashboard-kill.png"
        small = [image.resize((825, 675)).quantize(NUM_COLOURS) for _, image in self.frames]
        small[0].save(
            animation,
            save_all=True,
            append_images=small[1:],
            duration=FRAME_MS,
            loop=0,
            optimize=True,
        )
        last_of = dict(self.frames)
        height = SHEET_WIDTH * SIZE["height"] // SIZE["width"]
        moments = [image.resize((SHEET_WIDTH, height)) for image in last_of.values()]
        rows = -(-len(moments) // SHEET_COLUMNS)
        whole = Image.new("RGB", (SHEET_WIDTH * SHEET_COLUMNS, height * rows), "white")
        for number, image in enumerate(moments):
            row, column = divmod(number, SHEET_COLUMNS)
            whole.paste(image, (column * SHEET_WIDTH, row * height))
        whole.quantize(256).save(sheet, optimize=True)
        return [animation, sheet]


async def record(run: EngineKillRun, url: str) -> Recording:
    """Before, between and after."""
    from playwright.async_api import async_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("there is no Chromium (apt-get install chromium)")
    errors: list[str] = []
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = await browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        await page.goto(f"{url}/dashboard")
        recording = Recording(page)
        await recording.keep_taking(time.monotonic() + BEFORE_S, "two engines serve")
        engines = run.engines()
        victim = sorted(engines)[0]
        core_of(psutil.Process(engines[victim]["pid"])).kill()
        await recording.keep_taking(time.monotonic() + AFTER_S, f"{victim} was killed")
        deadline = time.monotonic() + REPLACED_TIMEOUT_S
        while not await asyncio.to_thread(run.is_whole):
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {REPLACED_TIMEOUT_S:g} s for a replacement")
            await recording.take("another one starts")
            await asyncio.sleep(INTERVAL_S * 2)
        await recording.keep_taking(time.monotonic() + AFTER_S, "another one serves in its place")
        await browser.close()
    if errors:
        raise SystemExit(f"the page's console has errors: {errors}")
    return recording


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="slipstream-record-") as directory:
        run = EngineKillRun(Path(directory), seed=5)
        try:
            recording = asyncio.run(record(run, run.url))
        except BaseException:
            run.abandon()
            raise
        run.close()
    for path in recording.save(IMAGES):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {len(recording.frames)} frames")
    counts: Any = run.clients.counts
    print(f"{counts.checked} samples checked, {counts.lost} lost, {counts.wrong_tokens} wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
