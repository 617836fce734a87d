#!/usr/bin/env python3
"""The flags of train_vlm.py and inference_vlm.py -> the tables of docs/options.md.

python docs/generate_options.py            write docs/options.md
python docs/generate_options.py --check    write nothing; exit 1 if the page is not what would be written
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE / "options.md"
INTRODUCTION = """\
<!-- Written by `python docs/generate_options.py`. Change the help text of a setting instead of this page. -->
# Options

All flags. `{script} --help` prints the same texts.
"""
NOTES = {
    "train_vlm.py": "`./run_vlm_training.sh` and `vlm-train` take the same flags. `--image_column` is accepted for "
    "`--image-column`, and so on. If a default depends on `--tune`, on the device or on the demo, the table says so.",
    "inference_vlm.py": "`./run_vlm_inference.sh` and `vlm-predict` take the same flags.",
}


def flag_name(action: argparse.Action) -> str:
    """A flag with its values as in the help text, in Markdown: `--epochs N`; `IMAGE` for a positional argument."""
    name = next((option for option in action.option_strings if option.startswith("--")), "")
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.choices:
        value = f"{{{','.join(action.choices)}}}"
    return f"`{' '.join(part for part in (name, value, '...' if action.nargs in ('+', '*') else '') if part)}`"


def tables(parser: argparse.ArgumentParser) -> str:
    """One Markdown table for each group of flags that is not empty."""
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if not actions:
            continue
        lines += [f"### {group.title.capitalize()}", "", "| flag | meaning |", "| --- | --- |"]
        lines += [f"| {flag_name(action)} | {(action.help or '').replace('|', chr(92) + '|')} |" for action in actions]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The whole of docs/options.md."""
    sys.path.insert(0, str(HERE.parent))
    import inference_vlm
    from vlm.config import build_parser

    parsers = {"train_vlm.py": build_parser(), "inference_vlm.py": inference_vlm.build_parser()}
    parts = [INTRODUCTION.format(script="python train_vlm.py")]
    for script, parser in parsers.items():
        parts.append(f"## Flags of {script}\n\n{NOTES[script]}\n\n{tables(parser)}")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE.name} is stale: run `python docs/generate_options.py`.", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
