"""What mkdocs cannot know: links from pages to files of the repository beside ``docs/``."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

# Records under this name count as mkdocs' own: a warning fails a strict build.
LOGGER = logging.getLogger("mkdocs.hooks")

DOCS = Path(__file__).resolve().parents[1]
_LINK_OUT = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Such a link works in the repository. The site has no such file: it keeps the text."""

    def keep_text(match: re.Match[str]) -> str:
        if not (DOCS / match[2]).exists():
            LOGGER.warning("%s links to %s, which is not there", page.file.src_uri, match[2])
        return match[1]

    return _LINK_OUT.sub(keep_text, markdown)
