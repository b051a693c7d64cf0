"""Write the flag tables of docs/flags.md from the program's own help texts.

python scripts/flag_tables.py            # print them
python scripts/flag_tables.py --write    # put them between its markers
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from main import build_parser
from utils import write_text

START, END = "<!-- flags -->\n", "<!-- /flags -->\n"


def flag_tables() -> str:
    lines = []
    for group in build_parser()._action_groups:
        actions = [a for a in group._group_actions if a.dest != "help"]
        if not actions:
            continue
        lines += [f"**{group.title}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for action in actions:
            flags = " ".join(f"`{flag}`" for flag in action.option_strings)
            default = "" if action.default is None else f"`{action.default}`"
            choices = "" if action.choices is None else " / ".join(f"`{c}`" for c in action.choices)
            text = (action.help or "").replace(" (default: %(default)s)", "")  # of Python 3.10
            meaning = " ".join(text.replace("%%", "%").replace("|", "\\|").split())
            lines.append(f"| {flags} | {default} | {meaning}{': ' + choices if choices else ''} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/flags.md")
    if not parser.parse_args(argv).write:
        print(flag_tables())
        return
    page = ROOT / "docs" / "flags.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    write_text(page, before + START + flag_tables() + END + after)


if __name__ == "__main__":
    main()
