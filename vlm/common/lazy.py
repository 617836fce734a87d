"""Names of a module that are imported when they are first used, so that importing the module stays fast."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(module: str, sources: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of a package or script that hands on names of other modules.

        if TYPE_CHECKING:
            from vlm.machine import pick_device

        __getattr__ = lazy_names(__name__, {".device": ["pick_device"]})

    Args:
        module: the `__name__` of the package or script.
        sources: the names to take from each other module; a module that begins with a dot is a file of the package.
    """
    source_of = {name: source for source, names in sources.items() for name in names}

    def get(name: str) -> Any:
        if name not in source_of:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(source_of[name], module), name)

    return get
