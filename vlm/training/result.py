"""What `train` returns: a finished run in its output folder, for notebooks and programs."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.classifier import VLMClassifier
from vlm.common import UsageError, read_json
from vlm.config import AUTO, BEST_MODEL, FINAL_MODEL, LOG, METADATA, PAGE, PREDICTIONS, RESULTS, user_path
from vlm.data import ImageSource
from vlm.inference import load_model_and_metadata, predict_batch
from vlm.report import figures_of, result_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FILES = {
    "best_model": BEST_MODEL,
    "final_model": FINAL_MODEL,
    "report": PAGE,
    "results": RESULTS,
    "predictions": PREDICTIONS,
    "log": LOG,
    "metadata": METADATA,
}
SHOWN = ("best_model", "report", "results")
FIRST_COLUMNS = ("kind", "step", "epoch")


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """A finished run. In a notebook it shows its test, its warnings and its figures.

    Attributes:
        output: the output folder, an absolute path.
        results: the content of `results.json`.
    """

    output: Path
    results: dict[str, Any]

    @classmethod
    def read(cls, output: str | Path = "vlm_results") -> "Result":
        """The finished run in an output folder.

        Raises:
            UsageError: there is none, or its results are damaged.
        """
        folder = Path(user_path(str(output))).absolute()
        if not (folder / RESULTS).is_file():
            raise UsageError(f"{folder} holds no finished run: train one first, or name its output folder.")
        results = read_json(folder / RESULTS, "Copy the folder again, or train again.")
        if isinstance(results, dict) and "tested" in results:
            raise UsageError(
                f"{folder} holds the test of a saved model, and not a run. Its figures are in {folder / RESULTS}, its "
                f"page is {folder / PAGE}; Result.read takes the output folder of a training."
            )
        if not isinstance(results, dict) or not ({"test", "history"} <= results.keys() or "out_of_fold" in results):
            raise UsageError(
                f"{folder / RESULTS} is damaged: it has no results. Copy the folder again, or train again."
            )
        return cls(folder, results)

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures of the test; of a cross-validation those of all out-of-fold predictions."""
        return self.results["test" if "test" in self.results else "out_of_fold"]

    @property
    def paths(self) -> dict[str, Path]:
        """What the run has written and is still there: best_model, report, results, log, metadata and others."""
        named = {name: self.output / file for name, file in FILES.items()}
        return {"output": self.output} | {name: path for name, path in named.items() if path.exists()}

    @cached_property
    def history(self) -> "DataFrame":
        """One row for each line of the log: kind (train or validation), step, epoch, and the figures that it has. Of a
        cross-validation: one row a fold."""
        from pandas import DataFrame

        frame = DataFrame(self.results["history"] if "history" in self.results else self.results["folds"])
        first = [name for name in FIRST_COLUMNS if name in frame]
        return frame[[*first, *(name for name in frame if name not in first)]]

    @cached_property
    def figures(self) -> "dict[str, Figure]":
        """The figures by name: training_curves, confusion_matrix, reliability."""
        return figures_of(self.results)

    @property
    def classifier(self) -> VLMClassifier:
        """The best model, loaded when it is first asked for. It is the `model` of the functions of `inference_vlm`."""
        return self._loaded[0]

    @property
    def processor(self) -> Any:
        """The processor of transformers that belongs to `classifier`."""
        return self._loaded[1]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that belong to `classifier`."""
        return self._loaded[2]

    def predict(self, images: Iterable[ImageSource], **options: Any) -> dict[str, dict[str, Any]]:
        """Classify images with the best model: `predict_batch`, with its options, results and errors."""
        return predict_batch(self.classifier, self.processor, images, self.metadata, **options)

    @cached_property
    def _loaded(self) -> tuple[VLMClassifier, Any, dict[str, Any]]:
        if "test" not in self.results:
            raise UsageError(
                f"{self.output} holds a cross-validation, which has a model for each fold, and no best one. "
                f"Load the one of a fold, such as Result.read({str(self.output / 'fold_1')!r})."
            )
        settings = self.results["settings"]
        return load_model_and_metadata(
            self.output / BEST_MODEL, settings.get("device", AUTO), settings.get("dtype", AUTO)
        )

    def __repr__(self) -> str:
        metrics = self.metrics
        return f"<Result: accuracy {metrics['accuracy']:.4f} on {metrics['samples']:,} images, {_shown(self.output)}>"

    def _repr_html_(self) -> str:
        paths = self.paths
        return result_html(self.results, self.figures, {name: _shown(paths[name]) for name in SHOWN if name in paths})


def _shown(path: Path) -> Path:
    """A path as people see it: relative to the current folder, if it is in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
