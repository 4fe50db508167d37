"""The model in Spark: the engine's masks, loaded once for each worker, and a broken image that does not end the job."""

from __future__ import annotations

import base64
import io
import logging
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import AERIAL
from malformed import picture
from PIL import Image

from smp_ensemble.architectures import create_network
from smp_ensemble.data import rle
from smp_ensemble.data.images import decode_image
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.tracking.flavor import save_model

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: pip install 'smp-ensemble[spark]'")
JAVA = shutil.which("java") or (os.environ.get("JAVA_HOME") and "java")

pytestmark = [
    pytest.mark.services,
    pytest.mark.slow,
    pytest.mark.skipif(not JAVA, reason="no Java on this machine: install the package default-jre-headless"),
    pytest.mark.filterwarnings("ignore"),  # Spark's own, of pandas and of sockets that it leaves to the collector
]

COUNT, PARTITIONS = 500, 8
HOOK = """
import os, sys

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith("members/00/model.safetensors") and "pyspark" in sys.modules:
        file = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{{os.getpid()}}\\n".encode())
        os.close(file)

sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def crops() -> list[bytes]:
    """Encoded images: of the real set where it is there, else noise."""
    files = sorted((AERIAL / "images").glob("*"))[:COUNT]
    return [path.read_bytes() for path in files] or [picture(number, size=(64, 64)) for number in range(COUNT)]


@pytest.fixture(scope="module")
def ensemble(crops) -> Ensemble:
    """A small network, at a threshold that divides the first image in two halves."""
    torch.manual_seed(1)
    options = {"encoder_depth": 3, "decoder_channels": [4, 4, 4]}
    network = create_network("unet", encoder_name="tu-mobilenetv3_small_050", model_options=options)
    members = [Member(network, imagenet())]
    (probabilities,) = Engine(Ensemble(members, mode="binary")).predict([decode_image(crops[0], "first")])
    names = ("background", "roof")
    return Ensemble(members, mode="binary", class_names=names, threshold=float(np.median(probabilities)))


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    """Two workers on this machine, which write down when they open a member's weights."""
    folder = tmp_path_factory.mktemp("spark")
    (folder / "sitecustomize.py").write_text(HOOK.format(log=str(folder / "loads.log")), encoding="utf-8")
    logging.getLogger("py4j").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        interrupted = signal.getsignal(signal.SIGINT)  # Spark takes it over, and does not give it back
        session = (
            pyspark.sql.SparkSession.builder.master("local[2]")
            .config("spark.ui.enabled", "false")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.sql.execution.arrow.maxRecordsPerBatch", "100")
            .config("spark.sql.shuffle.partitions", "2")
            .getOrCreate()
        )
        session.sparkContext.setLogLevel("ERROR")
        yield session
        session.stop()
        signal.signal(signal.SIGINT, interrupted)


@pytest.fixture(scope="module")
def model(ensemble, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(ensemble, folder)
    return folder


def unpack(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_masks_are_the_engines_and_each_worker_loads_once(spark, model, ensemble, crops):
    log = Path(os.environ["PYTHONPATH"]) / "loads.log"
    frame = spark.createDataFrame(list(enumerate(crops)), "number int, image binary").repartition(PARTITIONS, "number")
    udf = mlflow.pyfunc.spark_udf(spark, str(model), result_type="string", env_manager="local")
    found = dict(frame.select("number", udf(pyspark.sql.functions.struct("image"))).collect())
    images = [decode_image(crop, "crop") for crop in crops]
    expected = Engine(ensemble).predict(images)
    assert len(found) == len(crops) == COUNT
    masks = [make_mask(ensemble, image, probabilities) for image, probabilities in zip(images, expected, strict=True)]
    assert all(np.array_equal(unpack(found[number]), mask) for number, mask in enumerate(masks))
    assert 0.4 < masks[0].mean() < 0.6
    loads = Counter(log.read_text(encoding="utf-8").split())
    assert 1 <= len(loads) <= 3, loads  # local[2]: two workers; a third where Spark replaces one that was idle
    # A load opens the weights at most twice, to check and to read them; a worker has three tasks or more.
    assert max(loads.values()) <= 2 < PARTITIONS / len(loads), loads


def test_a_broken_image_is_a_row_of_its_own_where_errors_are_reported(spark, model, ensemble, crops):
    rows = [(0, crops[0]), (1, crops[1][:100]), (2, None), (3, crops[3])]
    frame = spark.createDataFrame(rows, "number int, image binary").coalesce(1)
    udf = mlflow.pyfunc.spark_udf(
        spark, str(model), result_type="rle string, error string", env_manager="local",
        params={"kind": "rle", "on_error": "report"},
    )  # fmt: skip
    found = dict(frame.select("number", udf(pyspark.sql.functions.struct("image"))).collect())
    assert found[1].error.startswith("cannot read image row 1: ")
    assert found[2].error == "expected image bytes or base64 in row 2, got nothing"
    assert found[1].rle == found[2].rle == ""
    for number in (0, 3):
        assert found[number].error == ""
        image = decode_image(crops[number], "crop")
        mask = make_mask(ensemble, image, Engine(ensemble).predict([image])[0])
        assert np.array_equal(rle.decode(found[number].rle, *mask.shape), mask)
    strict = mlflow.pyfunc.spark_udf(spark, str(model), result_type="string", env_manager="local")
    with pytest.raises(pyspark.errors.PythonException, match="cannot read image row 1"):
        frame.select(strict(pyspark.sql.functions.struct("image"))).collect()
