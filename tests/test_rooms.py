"""The rooms of `vlm/`: their faces, the tree in docs/architecture.md, and what tests may take. See also the import
contract in pyproject.toml."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.parent.name for path in ROOT.glob("vlm/*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_face_says_what_the_room_is_for_and_hands_on_what_it_names(room):
    face = importlib.import_module(f"vlm.{room}")
    first, *more = face.__doc__.strip().splitlines()
    assert first.endswith((".", ":")) and 2 <= len(more) <= 5, "a line, and a few more"
    assert face.__all__ and len(set(face.__all__)) == len(face.__all__)
    for name in face.__all__:
        getattr(face, name)


def test_the_architecture_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = next(part for part in page.split("```") if part.startswith("\ntrain_vlm.py"))
    missing = []
    for path in program():
        inner = path.relative_to(ROOT / "vlm").parts
        if path.name == "__init__.py":
            continue
        named = inner[1] if len(inner) == 2 else f"{inner[1]}/"
        section = tree.split(f"vlm/{inner[0]}/", 1)[1].split("\nvlm/", 1)[0]
        if not re.search(rf"(?<![\w/]){re.escape(named)}", section):
            missing.append("/".join(inner))
    assert missing == []


def test_tests_take_no_private_names():
    """A test that takes them breaks whenever a room is rearranged inside."""
    found = re.findall(
        r"(?:def |class )(_[a-z]\w*)|self\.(_[a-z]\w*)(?: =|:)", "".join(path.read_text() for path in program())
    )
    # Names such as _repr_html_ are how notebooks ask an object for what they show.
    private = {name for names in found for name in names if name and not name.endswith("_")}
    taken = []
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm"):
                taken += [f"{path.name}: {alias.name}" for alias in node.names if alias.name in private]
            elif isinstance(node, ast.Attribute) and node.attr in private and ast.unparse(node.value) != "self":
                taken.append(f"{path.name}: {ast.unparse(node)}")
            elif isinstance(node, ast.Constant) and re.fullmatch(r"vlm(\.\w+)*\._\w+", str(node.value)):
                taken.append(f"{path.name}: {node.value}")
    assert taken == []


def program() -> list[Path]:
    return sorted((ROOT / "vlm").rglob("*.py"))
