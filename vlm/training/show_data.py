"""--show-data: the dataset as the run would read it, on a page. No model is loaded."""

from functools import partial
from pathlib import Path

from vlm.common import UsageError, doing, format_table, note, printable
from vlm.config import DATA_PAGE, Settings
from vlm.conversation import build_prompts
from vlm.data import as_seen, load_data
from vlm.report import DataContent, is_data_page, write_data_page
from vlm.training.class_map import point_out_names, renamed
from vlm.training.output import check_place


def look_at_data(settings: Settings, dataset: object = None) -> None:
    """Read the dataset and write the page into the output folder, where an earlier run stays as it is.

    Args:
        dataset: see `load_data`.

    Raises:
        UsageError: settings or data with which a run cannot start, or a file of this name that is another page.
        WriteError: the page cannot be written.
    """
    page = Path(settings.output_dir) / DATA_PAGE
    check_place(settings)
    if page.exists() and not (page.is_file() and is_data_page(page)):
        raise UsageError(f"{page} is no page of --show-data: move it away, or choose another --output-dir.")
    with doing("reading the dataset"):
        data = load_data(settings, dataset)
    note("\n" + format_table(data.summary) + "\n")
    prompts = build_prompts(settings, data.class_names)  # finds mistakes in the files about the classes
    point_out_names(prompts)
    if settings.trains_folds:
        note(f"note: the page is about fold 1 of {settings.folds}; --fold N shows another one.")
    name = "the demo" if settings.demo else str(data.source["dataset"])
    page.parent.mkdir(parents=True, exist_ok=True)
    train_in = partial(as_seen, data.train, settings)
    content = DataContent(data, name, settings.seed, renamed(prompts), settings.views, train_in)
    write_data_page(page, content)
    print(f"Look at {printable(str(page))}")
