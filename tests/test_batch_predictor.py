"""`BatchPredictor`: columns in, columns out, in other processes too."""

import importlib.util
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from sklearn.datasets import load_digits

from inference_vlm import BatchPredictor, load_model_and_metadata, predict_single_image
from vlm.common import UsageError
from vlm.inference import update_metadata

COUNT = 5


@pytest.fixture(scope="module")
def arrays():
    """(B, H, W, 3)"""
    images = load_digits().images[:COUNT] * 15
    return np.repeat(images.astype(np.uint8)[..., None], 3, axis=-1)


@pytest.fixture(scope="module")
def paths(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(COUNT)]


@pytest.fixture(scope="module")
def files(paths):
    """The bytes of the files, as an array of objects."""
    return np.array([open(path, "rb").read() for path in paths], dtype=object)


@pytest.fixture(scope="module")
def expected(demo_run, paths):
    model, processor, metadata = load_model_and_metadata(demo_run / "best_model", device="cpu")
    return [predict_single_image(model, processor, path, metadata) for path in paths]


@pytest.fixture(scope="module")
def predictor(demo_run):
    return BatchPredictor(demo_run / "best_model", device="cpu")


def test_bytes_paths_arrays_and_images_give_what_single_predictions_give(predictor, arrays, paths, files, expected):
    mixed = np.empty(COUNT, dtype=object)
    mixed[:] = [paths[0], files[1], arrays[2], Image.open(paths[3]), {"bytes": files[4], "path": None}]
    for batch in (
        {"image": arrays},
        {"path": np.array(paths)},
        {"bytes": files, "path": np.array(paths)},
        {"img": mixed},
    ):
        found = predictor(batch)
        assert set(found) == {*batch, "prediction", "confidence", "probabilities", "error_bound", "abstained", "error"}
        assert found["prediction"].tolist() == [prediction for prediction, _, _ in expected]
        np.testing.assert_allclose(found["confidence"], [confidence for _, confidence, _ in expected], atol=1e-5)
        assert found["probabilities"].shape == (COUNT, 10) and found["abstained"].tolist() == [False] * COUNT
        best = found["probabilities"].argmax(-1)
        assert [predictor.class_names[i] for i in best] == found["prediction"].tolist()
        assert all(found[name] is batch[name] for name in batch), "the columns of the batch are handed on"


def test_an_image_that_cannot_be_read_is_a_row_with_its_error(predictor, files):
    found = predictor({"id": np.arange(3), "bytes": np.array([files[0], b"no image", None], dtype=object)})
    assert found["error"].tolist()[0] is None and found["error"][1].startswith("row 2: not an image")
    assert found["error"][2] == "row 3: there is no image" and found["prediction"][1:].tolist() == [None, None]
    assert np.isnan(found["confidence"]).tolist() == [False, True, True]
    assert np.isnan(found["probabilities"]).all(-1).tolist() == [False, True, True]
    assert found["id"].tolist() == [0, 1, 2]


def test_an_empty_batch_has_the_same_columns(predictor):
    found = predictor({"image": np.empty((0, 8, 8, 3), dtype=np.uint8)})
    assert found["probabilities"].shape == (0, 10) and len(found["prediction"]) == 0


def test_what_is_kept_and_explained_is_asked_for(demo_run, files, expected):
    predictor = BatchPredictor(demo_run / "best_model", device="cpu", image_column="jpg", keep=["id"], explain=True)
    found = predictor({"jpg": files, "id": np.arange(COUNT), "prediction": np.arange(COUNT)})
    assert "jpg" not in found and found["id"].tolist() == list(range(COUNT))
    assert found["full_response"].tolist() == [text for _, _, text in expected]


def test_unclear_columns_are_named(predictor, demo_run, files):
    with pytest.raises(UsageError, match=r"no column was recognized by its name\. Columns there: x-ray, id\.$"):
        predictor({"x-ray": files, "id": np.arange(COUNT)})
    with pytest.raises(UsageError, match=r"no column phot\. Columns there: photo\. Did you mean photo\?"):
        BatchPredictor(demo_run / "best_model", image_column="phot")({"photo": files})
    with pytest.raises(UsageError, match="columns with the names of results: error"):
        predictor({"bytes": files, "error": np.arange(COUNT)})


def test_columns_of_other_lengths_and_unknown_ones_are_refused(predictor, demo_run, files):
    with pytest.raises(UsageError, match=f"the column id has 2 values, and there are {COUNT} images"):
        predictor({"bytes": files, "id": [1, 2]})
    some = BatchPredictor(demo_run / "best_model", keep="id")
    with pytest.raises(UsageError, match=r"keep: no column id\. Columns there: bytes, idx\. Did you mean idx\?"):
        some({"bytes": files, "idx": range(COUNT)})


def test_a_table_of_pyarrow_and_its_columns_are_a_batch(predictor, files, expected):
    import pyarrow

    table = pyarrow.table({"content": list(files), "id": range(COUNT)})
    for batch in (table, table.to_batches()[0], {name: table[name] for name in table.column_names}):
        found = predictor(batch)
        assert found["prediction"].tolist() == [prediction for prediction, _, _ in expected]
        assert list(map(int, map(str, found["id"]))) == list(range(COUNT))
    with pytest.raises(UsageError, match="Columns there: id"):
        predictor(table.drop_columns(["content"]))


def test_it_is_sent_without_the_model(predictor, demo_run, files, expected, tmp_path):
    predictor({"bytes": files})
    sent = pickle.dumps(predictor)
    assert len(sent) < 2000
    found = pickle.loads(sent)({"bytes": files})
    assert found["prediction"].tolist() == [prediction for prediction, _, _ in expected]
    assert pickle.dumps(BatchPredictor(tmp_path / "not there")), "the folder may be on another machine"


def test_another_model_in_the_same_folder_is_another_function(demo_run, tmp_path):
    shutil.copytree(demo_run / "best_model", tmp_path / "model")
    predictor = BatchPredictor(tmp_path / "model")
    before = pickle.dumps(predictor)
    assert pickle.dumps(predictor) == before
    _, _, metadata = load_model_and_metadata(tmp_path / "model", device="cpu")
    update_metadata(tmp_path / "model", metadata | {"trained": "again"})
    assert pickle.dumps(predictor) != before


def test_a_dataset_is_mapped(predictor, files, expected):
    import datasets

    rows = datasets.Dataset.from_dict({"image": list(files)}).cast_column("image", datasets.Image())
    for decoded in (rows, rows.cast_column("image", datasets.Image(decode=False))):
        found = decoded.map(predictor, batched=True, batch_size=2, remove_columns=["image"], load_from_cache_file=False)
        assert found["prediction"] == [prediction for prediction, _, _ in expected]
        assert len(found["probabilities"][0]) == 10 and found["error"] == [None] * COUNT
    named = rows.cast_column("image", datasets.Image(decode=False)).add_column("path", list(map(str, range(COUNT))))
    keeping = BatchPredictor(predictor.model_dir, device="cpu", keep=["path"])
    found = named.map(keeping, batched=True, remove_columns="image", load_from_cache_file=False)
    assert "image" not in found.column_names and list(found["path"]) == list(map(str, range(COUNT)))


def test_the_example_with_a_dataset_keeps_the_file_names_and_a_damaged_image_is_a_row(demo_run, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    example = next(text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "imagefolder" in text)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_run, "vlm_results")
    (tmp_path / "vlm_results/demo_images/digit_7.png").write_bytes(b"no image")
    found: dict = {}
    exec(example, found)
    rows = found["rows"]
    assert rows.column_names[0] == "file" and "image" not in rows.column_names
    assert [os.path.basename(name) for name in rows["file"]] == [f"digit_{i}.png" for i in range(10)]
    assert [i for i, error in enumerate(rows["error"]) if error] == [7] and "digit_7.png: " in rows["error"][7]


def test_a_data_frame_of_pandas_is_a_batch(predictor, files, expected):
    import pandas as pd

    frame = pd.DataFrame({"content": list(files), "id": range(COUNT)})
    found = predictor(frame)
    table = pd.DataFrame(found | {"probabilities": list(found["probabilities"])})
    assert table.prediction.tolist() == [prediction for prediction, _, _ in expected]
    assert table.id.tolist() == list(range(COUNT)) and table.probabilities.map(len).tolist() == [10] * COUNT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (requirements-cluster.txt)")
def test_the_example_with_ray_data_classifies_with_two_workers(demo_run, paths, expected, tmp_path, monkeypatch):
    import pandas as pd
    import ray

    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    example = next(text for text in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "import ray" in text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vlm_results").symlink_to(demo_run)
    folder = os.path.dirname(paths[0])
    where = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": where}, logging_level="error")
    try:
        exec(example.replace("my_images", folder), {})
    finally:
        ray.shutdown()
    found = pd.read_parquet(tmp_path / "predictions")
    found = found.set_index(found.path.map(os.path.basename)).loc[list(map(os.path.basename, paths))]
    assert found.prediction.tolist() == [prediction for prediction, _, _ in expected]
    np.testing.assert_allclose(found.confidence, [confidence for _, confidence, _ in expected], atol=1e-5)
    assert set(found.probabilities.map(len)) == {10}
