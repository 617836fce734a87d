"""The files of a model's folder, looked at before anything in it is loaded.

Weights are safetensors files that lie in the folder itself. An index that names another format (a pickle can run code)
or a place outside, and a link that leads outside, are refused.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm.common import UsageError, printable, read_json, reason
from vlm.config import BEST_MODEL, HEAD_FILE

COPY_AGAIN = "Copy or download the model again."
CONFIG, ADAPTER = "config.json", "adapter_config.json"
# Each is one JSON object; only the first has to be there.
SETTINGS_FILES = (
    CONFIG,
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"
LOADED = (".json", ".jinja", ".model", ".txt", WEIGHTS)
OTHER_WEIGHTS = {".bin": "a pickle, which can run code", ".pt": "a pickle, which can run code"}
OTHER_WEIGHTS |= {".pth": OTHER_WEIGHTS[".pt"], ".ckpt": OTHER_WEIGHTS[".pt"], ".gguf": "made for llama.cpp"}
LFS_POINTER = b"version https://git-lfs"


class MissingFiles(UsageError):
    """A folder, or a model on the hub, lacks files that every model has."""


def check_file_names(name: str, files: Collection[str], needed: Mapping[str, str] | None = None) -> None:
    """Check that a model has the files that are needed.

    Args:
        name: what messages call the model.
        files: their paths, relative to its folder.
        needed: further files that have to be there, and what to say if they are not.

    Raises:
        UsageError: no config.json, no weights as safetensors, or an adapter.
    """
    if ADAPTER in files:
        raise UsageError(
            f"model {name}: {ADAPTER} there, so it is an adapter (LoRA), which only changes another model. Merge the "
            "two (merge_and_unload and save_pretrained of peft), then give the merged folder."
        )
    if CONFIG not in files:
        raise MissingFiles(f"model {name}: no {CONFIG} there. Expected a model as transformers saves it.")
    for file, expected in (needed or {}).items():
        if file not in files:
            raise MissingFiles(f"model {name}: no {file} there. {expected}")
    if not any(file.endswith(WEIGHTS) and "/" not in file for file in files):
        others = [(file, OTHER_WEIGHTS.get(Path(file).suffix)) for file in sorted(files)]
        found = next((f", only {printable(file)} ({what})" for file, what in others if what), "")
        raise MissingFiles(
            f"model {name}: no weights in *{WEIGHTS} files{found}. Other formats are not loaded; choose another model."
        )


def check_model_files(folder: Path, name: str | None = None) -> None:
    """Check that a folder has the files of a model, and that nothing but them would be loaded.

    Args:
        name: what messages call the model; default: the folder.

    Raises:
        UsageError: a file is missing, damaged, no file, or a link that leads out of the folder.
        UsageError: the weights would be read from another format or another place.
    """
    name = name or str(folder)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"model {name}: the folder cannot be read ({reason(error)}).") from error
    if not (folder / CONFIG).exists() and (folder / BEST_MODEL / CONFIG).is_file():
        raise UsageError(f"{folder} is the folder of a run: its model is {folder / BEST_MODEL}.")
    check_file_names(name, [path.name for path in paths])
    for path in paths:
        if path.suffix in LOADED:
            _check_file(path, folder)
    if (folder / HEAD_FILE).exists() or (folder / HEAD_FILE).is_symlink():
        _check_file(folder / HEAD_FILE, folder)
    settings = {file: read_object(folder / file) for file in SETTINGS_FILES if (folder / file).exists()}
    indices = [path for path in paths if path.name.endswith(INDEX)]
    if "transformers_weights" in settings[CONFIG]:
        explicit = settings[CONFIG]["transformers_weights"]
        _check_entry(folder / CONFIG, explicit, (WEIGHTS, INDEX))
        if not (folder / explicit).exists():
            raise MissingFiles(f"{folder / CONFIG} names weights that are missing: {explicit}. Copy them too.")
    for index in indices:
        _check_index(name, index)
    if (
        "audio_tokenizer" in settings.get("processor_config.json", {})
        or (folder / "audio_tokenizer_config.json").exists()
    ):
        raise UsageError(f"model {name}: it asks for a second model, an audio tokenizer. Choose another model.")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder. Raises UsageError if it cannot be read or is of another type."""
    content = read_json(path, COPY_AGAIN)
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, expected a JSON object. {COPY_AGAIN}")
    return content


def _check_file(path: Path, folder: Path) -> None:
    """Raises UsageError unless a path is a file that can be read, lies in its folder, and is itself what was wanted."""
    if not path.exists():
        raise UsageError(f"{path} is a link to a file that is not there. {COPY_AGAIN}")
    if not path.is_file():
        raise UsageError(f"{path} is not a file. {COPY_AGAIN}")
    if not _lies_inside(path, folder):
        raise UsageError(
            f"{path} is a link to {path.resolve()}, outside of the model's folder. Copy the file itself there, if you "
            "trust it."
        )
    try:
        with path.open("rb") as file:
            begins = file.read(len(LFS_POINTER))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}).") from error
    if begins == LFS_POINTER:
        raise UsageError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}, or download the "
            "model again."
        )


def _lies_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder. The hub's cache has links in `snapshots/COMMIT` to files in `blobs`."""
    folder, target = folder.resolve(), path.resolve()
    cached = folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs")
    return cached or target.is_relative_to(folder)


def _check_index(name: str, index: Path) -> None:
    """Raises UsageError unless an index names safetensors files of its own folder, and all of them are there."""
    content = read_object(index)
    weights = content.get("weight_map")
    if not isinstance(weights, dict):
        raise UsageError(f"{index} is damaged: it has no weight_map. {COPY_AGAIN}")
    for entry in weights.values():
        _check_entry(index, entry, (WEIGHTS,))
    shards = set(weights.values())
    missing = sorted(shard for shard in shards if not (index.parent / shard).exists())
    if missing:
        raise MissingFiles(
            f"model {name}: {len(missing)} of {len(shards)} files of weights are missing, such as {missing[0]}. "
            "Copy them too."
        )
    if not isinstance(content.get("metadata"), dict):
        raise UsageError(f"{index} is damaged: it has no metadata. {COPY_AGAIN}")


def _check_entry(file: Path, entry: Any, endings: tuple[str, ...]) -> None:
    """Raises UsageError unless what a file names as weights is the plain name of a file with one of the endings."""
    if not isinstance(entry, str) or Path(entry).name != entry or "\\" in entry:
        problem = "outside of the model's folder"
    elif not entry.endswith(endings):
        problem = "which is no safetensors file"
    else:
        return
    raise UsageError(
        f"{file} names weights in {printable(str(entry))}, {problem}. Only *{WEIGHTS} files next to it are loaded; "
        "choose another model."
    )
