"""What ``slipstream rollout`` shows in a terminal while it works, as a picture.

``python -m tests.ui.picture_cli`` starts a real server with an engine of a tiny model, runs the
command in ``tmux``, and lets Chromium draw what the terminal holds half way through.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.support.models import make_model
from tests.support.server_process import ServerProcess, wait_until
from tests.ui.conftest import BROWSERS

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "cli.png"
WIDTH, HEIGHT = 100, 14
NUM_PROMPTS = 240
SESSION = "slipstream-picture"
BEGIN_TIMEOUT_S = 60
WATCH_S = 4.0


def screen() -> str:
    """What the terminal shows, with its colours."""
    command = ["tmux", "capture-pane", "-e", "-p", "-t", SESSION]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def watched(command: str, directory: Path) -> str:
    """The screen half way through a command."""
    size = ["-x", str(WIDTH), "-y", str(HEIGHT)]
    commands = shlex.quote(str(Path(sys.executable).parent))
    place = shlex.quote(str(directory))
    shell = f"export PS1='$ ' PATH={commands}:$PATH; cd {place}; exec bash --norc"
    subprocess.run(["tmux", "new-session", "-d", "-s", SESSION, *size, shell], check=True)
    try:
        wait_until(lambda: screen().startswith("$"), BEGIN_TIMEOUT_S, "the shell")
        subprocess.run(["tmux", "send-keys", "-t", SESSION, command, "Enter"], check=True)
        wait_until(lambda: "%" in screen() or "/" in screen(), BEGIN_TIMEOUT_S, "progress")
        time.sleep(WATCH_S)
        return screen()
    finally:
        subprocess.run(["tmux", "kill-session", "-t", SESSION], check=True)


def draw(text: str, path: Path) -> None:
    """A terminal with this in it."""
    from playwright.sync_api import sync_playwright

    console = Console(record=True, width=WIDTH, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Text.from_ansi(text.rstrip()))
    svg = console.export_svg(title="slipstream rollout")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise SystemExit("there is no Chromium (apt-get install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(f"<body style='margin:0'>{svg}</body>")
        page.locator("svg").first.screenshot(path=path)
        browser.close()


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="slipstream-picture-") as name:
        directory = Path(name)
        prompts = [{"prompt": f"{n}+{n + 1}="} for n in range(NUM_PROMPTS)]
        (directory / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
        server = ServerProcess(directory, make_model(directory / "model", seed=9), {})
        try:
            url = str(server.client.base_url).rstrip("/")
            text = watched(
                f"slipstream rollout prompts.jsonl -o samples.jsonl --n 4 --max-tokens 200 "
                f"--url {url}",
                directory,
            )
            server.stop()
        finally:
            server.kill()
    print(text)
    draw(text, PICTURE)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
