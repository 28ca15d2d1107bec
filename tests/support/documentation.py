"""Reads the commands that the documentation shows, so that tests run exactly what a reader runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_SHELL = ("sh", "shell", "bash")


def pages() -> Iterator[str]:
    """Yield the paths of all pages, relative to the repository."""
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "deploy/**/*.md"):
        yield from sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each code block of a page, without the indentation of lists."""
    for found in _FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield found["language"], re.sub(rf"^{found['indent']}", "", found["body"], flags=re.MULTILINE)


def commands(page: str) -> list[str]:
    """Return the commands of a page: each line with a prompt of a console block or an indented one, and each block for the shell."""
    found = re.findall(r"^    \$ (.*)", _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")), re.MULTILINE)
    for language, text in blocks(page):
        if language == "console":
            found += [match[1].replace("\\\n", "") for match in re.finditer(r"^\$ ((?:.*\\\n)*.*)", text, re.MULTILINE)]
        elif language in _SHELL:
            found.append(text.rstrip("\n"))
    return [re.sub(r"  +# .*", "", command) for command in found]


def documented(page: str, beginning: str) -> str:
    """Return the only command of a page that begins with this text, in its first place."""
    matching = dict.fromkeys(command for command in commands(page) if command.startswith(beginning))
    assert len(matching) == 1, f"{page} has {len(matching)} different commands that begin with {beginning!r}"
    return next(iter(matching))


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub generates for the headings in the text of a page."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
