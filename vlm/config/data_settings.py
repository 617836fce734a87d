"""The settings of the data: where they are, which columns count, and how they are split."""

from dataclasses import dataclass

from vlm.config.declare import flag
from vlm.config.defaults import DEFAULT_DATASET, IN_MEMORY


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """See `Settings`."""

    dataset: str | None = flag(
        None,
        "data",
        "hub id (owner/name or owner/name@revision), image folder, CSV, JSONL or JSON file, or save_to_disk folder "
        f"(default: {DEFAULT_DATASET})",
    )
    dataset_config: str | None = flag(None, "data", "configuration of a hub dataset, if it has several")
    dataset_split: str | None = flag(
        None,
        "data",
        "splits to read, or parts of them, such as 'train[:1000],test'; a single one is for training, and the others "
        "are cut from it (default: those called train, validation and test)",
        metavar="SPLITS",
    )
    image_column: str | None = flag(
        None, "data", "column with the images (default: found by its type, then by its name)"
    )
    label_column: str | None = flag(
        None, "data", "column with the labels (default: found by its type, then by its name)"
    )
    no_header: bool = flag(
        False, "data", "the first line of a CSV file is data; its columns are called column1, column2, ..."
    )
    image_folder: str | None = flag(
        None, "data", "folder that the paths in a table are relative to (default: the folder of the table)"
    )
    image_suffix: str | None = flag(
        None, "data", "ending that is added to the paths or names in a table, such as .jpg", metavar="SUFFIX"
    )
    reasoning_column: str | None = flag(
        None, "data", "column with a text about each image that the model learns to write (default: one text a class)"
    )
    class_names: list[str] | None = flag(
        None,
        "data",
        "names of the classes: several words, or one string separated by semicolons, commas or spaces",
        nargs="+",
        metavar="NAME",
    )
    group_column: str | None = flag(
        None, "data", "column with what belongs together, such as a patient or a place: never cut into two splits"
    )
    group_pattern: str | None = flag(
        None,
        "data",
        "regular expression that finds the group in the name of an image, such as 'patient[0-9]+'",
        metavar="REGEX",
    )
    exclude: str | None = flag(
        None,
        "data",
        'leave out the images that a CSV file names in its column "image", such as label_issues.csv of a run',
        metavar="FILE",
    )
    max_samples: int | None = flag(
        None,
        "data",
        "at most this many images of each split, balanced over the classes (with --streaming: of "
        "validation and test, by default 1000)",
    )
    streaming: bool = flag(
        False,
        "data",
        "read the training images while training, for datasets larger than the disk; needs --max-steps",
    )
    shuffle_buffer: int = flag(
        1000, "data", "with --streaming: images among which the next one is drawn (default: 1000)"
    )
    check_images: bool = flag(
        False,
        "data",
        "check all images before the training; otherwise those of more than 5,000 are checked while they are used",
    )
    shots: int | None = flag(None, "data", "train on this many images of each class, drawn with the seed")
    folds: int | None = flag(
        None,
        "data",
        "cross-validation: divide the images of train and validation into this many folds, and train as often, each "
        "time without one fold, which is the test; a test split of the dataset stays out",
    )
    fold: int | None = flag(
        None, "data", "with --folds: train only this one, 1 to --folds, as an ordinary run, such as on another machine"
    )
    validation_ratio: float = flag(
        0.15, "data", "share of the train split for validation, if there is no validation split (default: 0.15)"
    )
    test_ratio: float = flag(
        0.15, "data", "share of the train split for the test, if there is no test split (default: 0.15)"
    )

    @property
    def of_dataset(self) -> str:
        """What messages about the dataset begin with."""
        return "the dataset" if self.dataset == IN_MEMORY else f"--dataset {self.dataset}"
