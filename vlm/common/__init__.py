"""What every room may use: errors and their exit codes, notes and progress, tables, and files written whole.

Knows nothing of images, models or settings, and imports no package until notes or bars are used: the set-up of the
environment and the doctor run before any package is installed.
"""

from typing import TYPE_CHECKING

from vlm.common.checksums import CHECKSUMS, check_checksums, read_checksums, write_checksums
from vlm.common.errors import (
    RunError,
    Stopped,
    UsageError,
    Worded,
    WriteError,
    did_you_mean,
    doing,
    exit_code,
    first_line,
    is_out_of_memory,
    one_line,
    reason,
    write_failure,
)
from vlm.common.files import cache_folder, read_json, replacing, write_json, writing
from vlm.common.folders import existing, files_of_others, read_folder, recover, remove, usual_modes, write_folder
from vlm.common.lazy import lazy_names
from vlm.common.modes import evaluation_mode
from vlm.common.processes import OTHER_ENDED, is_main_process, process_count
from vlm.common.programs import command_of, resume_command
from vlm.common.streams import any_text, drop_closed_pipes
from vlm.common.switches import switches_as_before
from vlm.common.tables import format_table, text_width
from vlm.common.text import (
    CONTINUED,
    brief,
    csv_cell,
    dtype_name,
    joined,
    listed,
    message_text,
    printable,
    printable_lines,
    shorten,
    size_text,
    utf8_text,
)

if TYPE_CHECKING:
    from vlm.common.progress import Bar, note, with_bar

__all__ = [
    "CHECKSUMS",
    "CONTINUED",
    "OTHER_ENDED",
    "Bar",
    "RunError",
    "Stopped",
    "UsageError",
    "Worded",
    "WriteError",
    "any_text",
    "brief",
    "cache_folder",
    "check_checksums",
    "command_of",
    "csv_cell",
    "did_you_mean",
    "doing",
    "drop_closed_pipes",
    "dtype_name",
    "evaluation_mode",
    "existing",
    "files_of_others",
    "exit_code",
    "first_line",
    "format_table",
    "is_main_process",
    "is_out_of_memory",
    "joined",
    "lazy_names",
    "listed",
    "message_text",
    "note",
    "one_line",
    "printable",
    "printable_lines",
    "process_count",
    "read_checksums",
    "read_folder",
    "read_json",
    "reason",
    "resume_command",
    "recover",
    "remove",
    "replacing",
    "shorten",
    "size_text",
    "switches_as_before",
    "text_width",
    "usual_modes",
    "utf8_text",
    "with_bar",
    "write_failure",
    "write_folder",
    "write_json",
    "write_checksums",
    "writing",
]

# These need tqdm. The set-up of the environment, the doctor and `--help` run before it is installed.
__getattr__ = lazy_names(__name__, {".progress": ["Bar", "note", "with_bar"]})
