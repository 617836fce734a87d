"""The readers of labeled images, a file for each kind of source; `read_source` picks the one that fits.

Nothing is decoded here, and labels stay as they are in the source.
"""

from vlm.data.sources.columns import IMAGE_COLUMNS
from vlm.data.sources.groups import groups_by_pattern, point_out_groups
from vlm.data.sources.read import read_source
from vlm.data.sources.rows import EXPECTED, HUB, Rows, Source

__all__ = ["EXPECTED", "HUB", "IMAGE_COLUMNS", "Rows", "Source", "groups_by_pattern", "point_out_groups", "read_source"]
