"""A trained model as a page and a service.

batcher.py classifies the images of many requests together; app.py answers programs at /predict, page.py people in a
browser; guard.py refuses what neither answers; server.py runs both for command.py.

The names are imported when they are first used: the packages behind them are optional.
"""

from typing import TYPE_CHECKING

from vlm.common import lazy_names

if TYPE_CHECKING:
    from vlm.service.command import run_server
    from vlm.service.model import Served, find_examples, served_name, test_accuracy
    from vlm.service.server import check_packages, open_port

__all__ = ["Served", "check_packages", "find_examples", "open_port", "run_server", "served_name", "test_accuracy"]

__getattr__ = lazy_names(
    __name__,
    {
        ".command": ["run_server"],
        ".model": ["Served", "find_examples", "served_name", "test_accuracy"],
        ".server": ["check_packages", "open_port"],
    },
)
