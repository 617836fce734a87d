#!/usr/bin/env python3
"""JSON files of the benchmarks -> the tables of docs/performance.md, objectives.md and sharing.md, between their
markers.

python benchmarks/report.py [FOLDER] [--document FILE.md...]

A table stands between `<!-- NAME -->` and `<!-- end NAME -->`, with the command and the machine below it. The rest of
the page stays as it is.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCUMENTS = [HERE.parent / "docs" / name for name in ("performance.md", "objectives.md", "sharing.md")]
SIZES = {
    "full": "the true shape",
    "quick": "a sixth of the model (--quick)",
    "tiny": "a model without meaning (--tiny)",
}


def cell(value: Any) -> str:
    """A value as in the tables: numbers with three digits."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figures(rows: list[dict[str, Any]], rounds: int) -> str:
    """What the figures of a table are, in words."""
    return "means over seeds" if "seeds" in rows[0] else f"medians of {rounds} round" + "s" * (rounds != 1)


def section(result: dict[str, Any]) -> str:
    """Table, command and machine of one benchmark."""
    rows, where = result["rows"], result["machine"]
    names = list(rows[0])
    lines = [
        "| " + " | ".join(names) + " |",
        "|" + "|".join(" ---: " if _numeric(rows, n) else " --- " for n in names) + "|",
    ]
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]
    chips = ", ".join(where[name] for name in ("gpu", "cpu") if name in where)
    machine = f"{chips}, {where['cores']} cores, {where['threads']} threads, load average {where['load']} at the end"
    versions = f"torch {where['torch']}, transformers {where['transformers']}" + (
        f", TRL {result['trl']}" if "trl" in result else ""
    )
    what = result.get("about") or figures(rows, result["rounds"])
    if "about" not in result and "seeds" not in names:  # seeds: of a model that the flags name
        what = f"{SIZES[result['size']]}; {what}"
    lines += ["", f"`{result['command']}`", f"{what}; {machine}; {versions}."]
    lines += [] if result["correct"] else ["", "**A check failed in this run.**"]
    return "\n".join(lines)


def _numeric(rows: list[dict[str, Any]], name: str) -> bool:
    return all(isinstance(row[name], int | float) and not isinstance(row[name], bool) for row in rows)


def fill(page: str, results: dict[str, dict[str, Any]]) -> tuple[str, set[str]]:
    """The page with the tables again that it has places for, and which these are."""
    filled = set()
    for name, result in results.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = section(result)
        page, found = pattern.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
        filled |= {name} if found else set()
    return page, filled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=HERE / "results",
        help="with the JSON files (default: benchmarks/results)",
    )
    parser.add_argument("--document", type=Path, nargs="+", help="(default: those three)")
    options = parser.parse_args()
    results = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(options.folder.glob("*.json"))
    }
    if not results:
        parser.error(f"no .json files in {options.folder}: run the benchmarks with --output first")
    placed: set[str] = set()
    for document in options.document or DOCUMENTS:
        page, filled = fill(document.read_text(encoding="utf-8"), results)
        document.write_text(page, encoding="utf-8")
        placed |= filled
        print(f"{len(filled)} tables in {document}", file=sys.stderr)
    if missing := sorted(results.keys() - placed):
        print(f"on no page between <!-- NAME --> and <!-- end NAME -->: {', '.join(missing)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
