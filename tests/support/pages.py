"""README and docs as the tests read them: fenced blocks, prose, anchors, shell commands."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]


class Block(NamedTuple):
    line: int
    language: str  # of a fence, "" where it names none
    note: str  # the comment on the line before it
    text: str


def blocks(page):
    """The fenced blocks of a page."""
    found, lines, opened = [], (ROOT / page).read_text().splitlines(), None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        note = lines[opened - 1] if opened and lines[opened - 1].startswith("<!--") else ""
        text = "\n".join(lines[opened + 1 : number]) + "\n"
        found.append(Block(opened + 2, lines[opened][3:].strip(), note, text))
        opened = None
    assert opened is None, f"{page}: the block in line {opened} does not end"
    return found


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """The shell commands of a page, continued lines joined: words of each, comments left out."""
    shell = "".join(block.text for block in blocks(page) if block.language == "sh")
    indented = "\n".join(line for line in prose(page).splitlines() if line.startswith("    "))
    for line in f"{shell}\n{indented}".replace("\\\n", " ").splitlines():
        if line.strip().startswith(("paceline ", "pip ", "accelerate ")):
            for part in line.split("&&"):
                yield shlex.split(part, comments=True)


def words_of(page):
    """What stands in backquotes in a page's prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))
