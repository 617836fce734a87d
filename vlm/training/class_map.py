"""What --class-map comes to, said before the training. It needs no torch."""

from vlm.common import listed, note
from vlm.conversation import Prompts

MOST_RENAMES_SHOWN = 12


def renamed(prompts: Prompts) -> dict[str, str]:
    """Class name -> the other name that the model is shown; empty without `--class-map`."""
    pairs = zip(prompts.class_names, prompts.readable_names, strict=False)
    return {code: name for code, name in pairs if code != name}


def point_out_names(prompts: Prompts) -> None:
    """Print which names the model is shown in the place of the class names (`--class-map`)."""
    if not prompts.readable_names:
        return
    others = renamed(prompts)
    note(
        "note: the model reads and writes readable names, and results keep the class names: "
        f"{listed((f'{code} -> {name}' for code, name in others.items()), MOST_RENAMES_SHOWN)}."
    )
    if kept := [code for code in prompts.class_names if code not in others]:
        note(f"note: --class-map has no other name for {listed(kept)}: the model is shown the class name.")
    note("")
