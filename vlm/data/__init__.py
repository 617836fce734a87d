"""From any labeled source of images to checked splits of samples.

Reads folders, tables and the hub, numbers the classes, cuts missing splits and opens images; also finds models on the
hub and plans the order of an epoch. Importing it loads neither torch nor transformers nor datasets.
"""

from vlm.data.augmentation import as_seen
from vlm.data.classes import problem_of_name
from vlm.data.cutting import balanced_positions
from vlm.data.finding import find_images
from vlm.data.formats import readable_formats
from vlm.data.hub import NotCached, model_folder
from vlm.data.hub_errors import again, trouble_of, within
from vlm.data.hub_names import fault_of_id, hub_name, looks_like_path
from vlm.data.images import ImageSource, UnreadableImage, open_image
from vlm.data.known import Found, KnownImages
from vlm.data.load import load_data
from vlm.data.model_files import COPY_AGAIN, check_model_files, read_object
from vlm.data.order import Step, epoch_plan
from vlm.data.refused import leave_out_refused
from vlm.data.sample import Sample
from vlm.data.sources import IMAGE_COLUMNS, Rows
from vlm.data.spellings import tidy
from vlm.data.splits import ROLES, Data, Split
from vlm.data.stream import Place, Stream
from vlm.data.to_classify import LabeledImages, match_classes, read_images
from vlm.data.trained_on import pack_keys, short_key, unpack_keys
from vlm.data.unchecked import check_what_is_known, leave_out_unreadable, note_unreadable, refuse_unreadable

__all__ = [
    "COPY_AGAIN",
    "IMAGE_COLUMNS",
    "ROLES",
    "Data",
    "Found",
    "ImageSource",
    "KnownImages",
    "LabeledImages",
    "NotCached",
    "Place",
    "Rows",
    "Sample",
    "Split",
    "Step",
    "Stream",
    "UnreadableImage",
    "again",
    "as_seen",
    "balanced_positions",
    "check_model_files",
    "epoch_plan",
    "fault_of_id",
    "find_images",
    "hub_name",
    "leave_out_refused",
    "check_what_is_known",
    "leave_out_unreadable",
    "load_data",
    "looks_like_path",
    "match_classes",
    "model_folder",
    "note_unreadable",
    "open_image",
    "pack_keys",
    "problem_of_name",
    "read_images",
    "read_object",
    "readable_formats",
    "refuse_unreadable",
    "short_key",
    "tidy",
    "trouble_of",
    "unpack_keys",
    "within",
]
