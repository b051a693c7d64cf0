"""The pages a reader sees, and the commands and Python examples in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "weights/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
WHOLE = re.compile(r"(python3?|\.venv/bin/python) \S+ \S|torchrun \S+ \S|scripts/\S+\.(py|sh) \S")
FLAGS = re.compile(r"--(model|preset|task) \S+ \S")  # what stands behind python main.py
TABLE = re.compile(r"^\|[^\n]*flags after `([^`]+)`[^\n]*\n((?:\|.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command of a page, as words."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of every fenced block."""
    return FENCE.findall(text)


def spans(text: str) -> list[str]:
    """Return what stands between single backquotes, in one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]


def command_lines(text: str) -> list[str]:
    """Return all commands of a page.

    They are the lines of fenced blocks, code in the text that is a whole command or the flags of
    one, and the rows of tables of flags after others.
    """
    lines = []
    for language, content in fences(text):
        if language in ("", "bash"):
            lines += content.replace("\\\n", " ").splitlines()
    for span in spans(text):
        if WHOLE.match(span):
            lines.append(span)
        elif FLAGS.match(span):
            lines.append(f"python main.py {span}")
    for flags, rows in TABLE.findall(text):
        more = re.findall(r"^\| `(--[^`]+)`", rows, re.MULTILINE)
        lines += [f"python main.py {flags} {row}" for row in more]
    return [line for line in lines if "…" not in line and not line.lstrip().startswith("#")]


def commands() -> list[Command]:
    """Return every command of every page once, parts joined by && one by one."""
    found = {}
    for page in PAGES:
        for line in command_lines(page.read_text(encoding="utf-8")):
            for part in line.split("&&"):
                words = tuple(shlex.split(part, comments=True))
                if words:
                    found.setdefault(words, Command(name_of(page), words))
    return list(found.values())


def examples() -> list[tuple[str, str]]:
    """Return the Python examples of every page, those of a page as one program."""
    programs = []
    for page in PAGES:
        blocks = [c for language, c in fences(page.read_text("utf-8")) if language == "python"]
        if blocks:
            programs.append((name_of(page), "\n".join(blocks)))
    return programs
