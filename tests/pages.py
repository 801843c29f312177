"""What the tests of the documentation read: pages in Markdown, their blocks, headings and links, and what they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARSED_ONLY = "*Parsed only: "
"""Begins the line below a block of commands that nobody ran here; what is needed to run them follows."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the lines of text next to it ("" where it follows another block)."""

    line: int
    kind: str
    text: str
    above: str
    below: str

    @property
    def file(self) -> str | None:
        """The file that a guide makes of it: "`recipe.yaml`:" is the line above."""
        found = re.search(r"`([\w.-]+)`:$", self.above)
        return found[1] if found else None

    @property
    def parsed_only(self) -> bool:
        return self.below.startswith(PARSED_ONLY)


@dataclass(frozen=True)
class Page:
    """A page of the repository."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def blocks(self) -> list[Block]:
        lines = self.text.splitlines()
        fences = [number for number, line in enumerate(lines) if line.startswith("```")]
        assert len(fences) % 2 == 0, f"{self.name}: a block is not closed"
        pairs = list(zip(fences[::2], fences[1::2], strict=True))
        return [
            Block(
                line=first + 1,
                kind=lines[first].removeprefix("```").strip(),
                text="\n".join(lines[first + 1 : last]) + "\n",
                above=next((line for line in reversed(lines[:first]) if line), "").removeprefix("```"),
                below=next((line for line in lines[last + 1 :] if line), ""),
            )
            for first, last in pairs
        ]

    @cached_property
    def prose(self) -> str:
        """Without the blocks."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    @property
    def anchors(self) -> set[str]:
        """As GitHub makes them of headings."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def names(self) -> Iterator[str]:
        """What stands in backticks, line by line."""
        for line in self.prose.splitlines():
            yield from re.findall(r"`([^`]+)`", line)


def pages() -> list[Page]:
    """README.md and all of docs/."""
    return [Page(ROOT / "README.md"), *(Page(path) for path in sorted((ROOT / "docs").glob("*.md")))]
