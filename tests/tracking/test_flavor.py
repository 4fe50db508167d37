"""The flavor: plain files that load anywhere, verified, without pickle."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import predictions_to_json
from PIL import Image

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError, InputError, IntegrityError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.tracking.flavor import IS_SERVED, PyfuncModel, load_model, log_model, register, save_model


@pytest.fixture
def ensemble(make_tiny_network):
    members = [Member(make_tiny_network(seed), imagenet()) for seed in (1, 2)]
    return Ensemble(members, mode="binary", weights=[1, 3], threshold=0.4, class_names=("background", "roof"))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 21, 34, 3), dtype=np.uint8)


def test_saved_and_loaded_is_the_same_ensemble(ensemble, tmp_path):
    save_model(ensemble, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    raw = torch.rand(1, 3, 16, 24) * 255
    with torch.no_grad():
        assert torch.equal(loaded(raw), ensemble(raw))
    assert (loaded.weights, loaded.threshold, loaded.class_names) == ((1, 3), 0.4, ("background", "roof"))
    with pytest.raises(ConfigError, match="exists already"):
        save_model(ensemble, tmp_path / "model")


def test_the_artifact_is_what_is_promised(ensemble, tmp_path):
    save_model(ensemble, tmp_path / "model")
    found = {path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*")}
    for name in (
        "MLmodel", "requirements.txt", "python_env.yaml", "ensemble.json", "code/smp_ensemble/__init__.py",
        "members/00/config.json", "members/00/model.safetensors", "members/01/model.safetensors",
    ):  # fmt: skip
        assert name in found
    assert not [name for name in found if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    spec = json.loads((tmp_path / "model" / "ensemble.json").read_text())
    assert spec["combiner"] == "mean"
    assert [len(member["sha256"]["model.safetensors"]) for member in spec["members"]] == [64, 64]


def test_smp_opens_a_member_offline_bit_for_bit(ensemble, tmp_path):
    save_model(ensemble, tmp_path / "model")
    network = smp.from_pretrained(tmp_path / "model" / "members" / "01")
    raw = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.eval()(raw), ensemble.members[1].network(raw))


def test_pyfunc_answers_arrays_lists_and_bytes_alike(ensemble, images, tracking):
    uri = log_model(ensemble, "roofs", registered_model_name="roofs")
    assert uri.startswith("models:/m-")
    register(uri, "roofs", alias="champion")
    model = mlflow.pyfunc.load_model("models:/roofs@champion")
    probabilities = Engine(ensemble)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).cpu().numpy()
    expected = (probabilities[:, 0] >= np.float32(0.4)).astype(np.uint8)

    masks = model.predict(images)
    assert (masks.dtype, masks.shape) == (np.uint8, (2, 21, 34))
    assert np.array_equal(masks, expected)
    got = model.predict(images, params={"kind": "probabilities"})
    assert np.array_equal(got, probabilities)
    mixed = model.predict([images[0], images[1][:, :20]])
    assert np.array_equal(mixed[0], expected[0])
    assert mixed[1].shape == (21, 20)

    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, format="PNG")
    for cell in (buffer.getvalue(), base64.b64encode(buffer.getvalue()).decode()):
        answer = model.predict(pd.DataFrame({"image": [cell]}, index=[7]))
        assert list(answer.index) == [7]
        decoded = np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"][7]))))
        assert np.array_equal(decoded, expected[0])


@pytest.mark.parametrize(
    ("data", "params", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), {}, r"add the batch axis, images\[None\]"),
        (np.zeros((1, 8, 8, 4), np.uint8), {}, r"expected image 0 with 3 bands, shape \(H, W, 3\), got \(8, 8, 4\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"kind": "masks"}, "unknown kind 'masks': did you mean 'mask'"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"views": "d5"}, "unknown views 'd5'"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"passes": 0}, "passes as a whole number above 0, got 0"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"passes": "many"}, "passes"),
        (np.zeros((1, 8, 8, 3), np.uint8), {"passes": 2}, "passes=2 needs dropout, but member 0 .Unet. holds none"),
        (np.full((1, 8, 8, 3), np.nan), {}, "finite"),
        ([], {}, "at least one image"),
    ],
)
def test_wrong_values_are_refused_by_name(ensemble, tmp_path, data, params, message):
    save_model(ensemble, tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    with pytest.raises(MlflowException, match=message) as caught:
        model.predict(data, params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_passes_of_a_loaded_model_repeat(make_tiny_network, images, tmp_path):
    dropping = Ensemble([Member(make_tiny_network(dropout=0.5), imagenet())], mode="binary", class_names=("a", "b"))
    save_model(dropping, tmp_path / "model")
    params = {"kind": "probabilities", "passes": 4}
    found = [mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images, params=params) for _ in range(2)]
    expected = Engine(dropping, passes=4)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).cpu().numpy()
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], expected)
    plain = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images, params={"kind": "probabilities"})
    assert not np.array_equal(plain, expected)


def test_views_of_a_loaded_model_are_its_own_unless_others_are_asked_for(make_tiny_network, images, tmp_path):
    member = Member(make_tiny_network(1), imagenet())
    turning = Ensemble([member], mode="binary", class_names=("background", "roof"), views="flips+scales:0.75,1")
    save_model(turning, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "ensemble.json").read_text())["views"] == ["flips", "scales:0.75,1"]
    assert load_model(str(tmp_path / "model")).views == turning.views
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    for params in ({}, {"views": "own"}, {"views": "none"}, {"views": "d4"}):
        expected = Engine(turning, views=params.get("views")).predict(list(images))
        found = model.predict(images, params={"kind": "probabilities", **params})
        assert np.array_equal(found, np.stack(expected))


def test_uncertainty_can_be_served(ensemble, images, tmp_path):
    save_model(ensemble, tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    expected = np.stack(Engine(ensemble).uncertainty(list(images)))
    found = model.predict(images, params={"kind": "uncertainty"})
    assert (found.dtype, found.shape) == (np.float32, (2, 3, 21, 34))
    assert np.array_equal(found, expected)
    assert found[:, 1].max() > 0  # two members do not agree
    answers = {}
    for name, data in (("array", images), ("frame", as_frame(images))):
        text = io.StringIO()
        predictions_to_json(model.predict(data, params={"kind": "uncertainty"}), text)
        answers[name] = json.loads(text.getvalue())["predictions"]
    np.testing.assert_allclose(answers["array"], expected, rtol=1e-6)
    for row, maps in zip(answers["frame"], expected, strict=True):
        decoded = np.load(io.BytesIO(base64.b64decode(row["uncertainty"])), allow_pickle=False)
        assert np.array_equal(decoded, maps)
        means = [row[name] for name in ("entropy", "mutual_information", "variation_ratio")]
        np.testing.assert_allclose(means, maps.astype(np.float64).mean(axis=(1, 2)), rtol=1e-6)


def as_frame(images: np.ndarray) -> pd.DataFrame:
    buffers = [io.BytesIO() for _ in images]
    for image, buffer in zip(images, buffers, strict=True):
        Image.fromarray(image).save(buffer, format="PNG")
    return pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode() for buffer in buffers]})


@pytest.mark.parametrize("signature", ["arrays", "images"])
def test_registries_that_demand_a_signature_get_one(ensemble, images, tmp_path, signature):
    save_model(ensemble, tmp_path / "model", signature=signature)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    if signature == "arrays":
        assert model.predict(images).shape == (2, 21, 34)
        with pytest.raises(MlflowException, match="shape|type"):
            model.predict(images.astype(np.float64))
    else:
        buffer = io.BytesIO()
        Image.fromarray(images[0]).save(buffer, format="PNG")
        assert list(model.predict(pd.DataFrame({"image": [buffer.getvalue()]}))) == ["mask"]
        with pytest.raises(MlflowException, match="image"):
            model.predict(pd.DataFrame({"picture": [b""]}))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["ensemble.json", "members/01/config.json", "members/00/model.safetensors"])
def test_damage_is_named_and_never_loaded(ensemble, tmp_path, name, how):
    save_model(ensemble, tmp_path / "model")
    damage(tmp_path / "model" / name, how)
    with pytest.raises(IntegrityError, match=name) as caught:
        load_model(str(tmp_path / "model"))
    assert "SHA-256" in str(caught.value)


def test_a_model_that_is_not_there_is_one_line(tracking):
    for uri in ("models:/nothing@champion", "models:/m-0123456789abcdef0123456789abcdef", "no/such/folder"):
        with pytest.raises(ConfigError, match="cannot find the model") as caught:
            load_model(uri)
        assert "\n" not in str(caught.value)


def test_another_flavor_is_refused(tmp_path):
    from sklearn.dummy import DummyClassifier

    mlflow.sklearn.save_model(
        DummyClassifier(), tmp_path / "other", serialization_format="cloudpickle", pip_requirements=["scikit-learn"]
    )
    with pytest.raises(IntegrityError, match="expected the flavor 'smp_ensemble'"):
        load_model(str(tmp_path / "other"))


@pytest.mark.slow
def test_loads_where_the_package_is_not_installed(ensemble, images, tmp_path):
    """In a process that cannot see our package or its entry points but through the artifact."""
    save_model(ensemble, tmp_path / "model")
    np.save(tmp_path / "images.npy", images)
    script = """
import importlib.metadata, importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
assert importlib.util.find_spec("smp_ensemble") is None, "the test needs a process without the package"
for name in ("torchmetrics", "lightning", "albumentations", "matplotlib"):  # not among a model's requirements
    sys.modules[name] = None
import mlflow, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
masks = model.predict(np.load(sys.argv[2], allow_pickle=False))
import smp_ensemble
assert smp_ensemble.__file__.startswith(sys.argv[1]), smp_ensemble.__file__
np.save(sys.argv[3], masks)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("model", "images.npy", "out.npy"))],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images)
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)


def test_members_keep_their_sources_and_training_images(tracking, track, tiny_splits, make_tiny_network):
    snapshots = track(0.5, 0.6)
    tracked = [load_model(snapshot.uri).members[0] for snapshot in snapshots]
    members = [*tracked, Member(make_tiny_network(3), imagenet())]  # the last one's past is unknown
    uri = log_model(Ensemble(members, mode="binary", class_names=tiny_splits.task.class_names))
    loaded = load_model(uri).members
    digests = frozenset(tiny_splits.train.image_digests)
    assert [member.source for member in loaded] == [*(snapshot.uri for snapshot in snapshots), ""]
    assert [member.training_images for member in loaded] == [digests, digests, None]


def test_threads_with_different_params_get_each_their_own_answer(make_tiny_network, tmp_path):
    dropping = Ensemble([Member(make_tiny_network(1, dropout=0.5), imagenet())], mode="binary", class_names=("a", "b"))
    save_model(dropping, tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    draw = np.random.default_rng(1)
    asked = [{}, {"views": "d4"}, {"passes": 3}, {"views": "flips", "passes": 2}, {"kind": "uncertainty"}]
    jobs = [
        (draw.integers(0, 256, (1, 24, 16 + 8 * (number % 2), 3), dtype=np.uint8), {"kind": "probabilities", **params})
        for number in range(4)
        for params in asked
    ]
    expected = [model.predict(images, params=params) for images, params in jobs]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: model.predict(job[0], params=job[1]), jobs))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_limits_of_servers_hold_where_mlflow_serves_and_are_set_by_the_environment(ensemble, tmp_path, monkeypatch):
    assert mlflow.environment_variables._MLFLOW_IS_IN_SERVING_ENVIRONMENT.name == IS_SERVED
    model = PyfuncModel(Engine(ensemble), {"SMP_ENSEMBLE_MAX_PASSES": "7"})
    dropout = "needs dropout"
    for served, passes, message in (("", 8, "at most 7 passes"), ("true", 8, "at most 7 passes"), ("true", 7, dropout)):
        monkeypatch.setenv(IS_SERVED, served)
        with pytest.raises(MlflowException, match=message):
            model.predict(np.zeros((1, 8, 8, 3), np.uint8), {"passes": passes})
    many = np.zeros((1025, 8, 8, 3), np.uint8)
    with pytest.raises(MlflowException, match="at most 1024 images in one request"):
        model.predict(many)
    monkeypatch.delenv(IS_SERVED)
    assert model.predict(many).shape == (1025, 8, 8)
    with pytest.raises(ConfigError, match="SMP_ENSEMBLE_MAX_IMAGE_PIXELS as a whole number"):
        PyfuncModel(Engine(ensemble), {"SMP_ENSEMBLE_MAX_IMAGE_PIXELS": "lots"})


def test_a_frame_that_pandas_cannot_print_raises_what_the_server_can_answer(ensemble):
    with pytest.raises(InputError, match="expected a column 'image'"):
        PyfuncModel(Engine(ensemble)).predict(pd.DataFrame([["x"]], columns=[{"image": 1}]))
