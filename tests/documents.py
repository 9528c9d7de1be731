"""The documents of this project, as tests and generators read them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
DOCS: Final = ROOT / "docs"
README: Final = ROOT / "README.md"
CONTRIBUTING: Final = ROOT / "CONTRIBUTING.md"
SECURITY: Final = ROOT / "SECURITY.md"
ALL_DOCUMENTS: Final = (README, CONTRIBUTING, SECURITY, *sorted(DOCS.glob("*.md")))


def find_blocks(document: Path, *languages: str) -> list[str]:
    """Return the code blocks of a document in these languages; "" is that of a block that names none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in blocks if language in languages]


def find_blocks_anywhere(*languages: str) -> list[str]:
    """Return the code blocks in these languages of all documents."""
    return [block for document in ALL_DOCUMENTS for block in find_blocks(document, *languages)]


def read_prose(document: Path) -> str:
    """Return what a document says outside of its code blocks, each line where it was."""
    return re.sub(
        r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), document.read_text(), flags=re.DOTALL | re.MULTILINE
    )


def find_anchors(document: Path) -> list[str]:
    """Return the anchors of a document's headings, as GitHub makes them: the second of one name gets ``-1``."""
    seen = Counter[str]()
    anchors = []
    for heading in re.findall(r"^#+ (.+)$", read_prose(document), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.append(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def find_links(document: Path) -> Iterator[tuple[str, str]]:
    """Return the links of a document within the repository: file ("" for itself) and anchor ("" for none)."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read_prose(document)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield file, anchor


def find_table(document: Path, *header: str) -> list[list[str]]:
    """Return the rows of the one table with this header, cell by cell; raises ValueError if it is not one."""
    found = re.findall(
        rf"^\| {re.escape(' | '.join(header))} \|\n\|[-|]+\|\n((?:\|.*\|\n)*)", document.read_text(), re.MULTILINE
    )
    if len(found) != 1:
        raise ValueError(f"{document.name} has {len(found)} tables with the header {header}")
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in found[0].splitlines()]
