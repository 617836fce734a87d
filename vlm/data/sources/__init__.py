"""The readers of labeled images, a file for each kind of source; `read_source` picks the one that fits.

Nothing is decoded here, and labels stay as they are in the source.
"""

from vlm.data.sources.read import read_source
from vlm.data.sources.rows import EXPECTED, Rows, Source

__all__ = ["EXPECTED", "Rows", "Source", "read_source"]
