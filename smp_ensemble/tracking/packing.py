"""A folder of members made into an MLflow model: description, requirements, signature, and our own code."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import AnyType

from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.views import OWN
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.payload import DEFAULT_KIND
from smp_ensemble.inference.requests import RAISE
from smp_ensemble.registry import nearest
from smp_ensemble.tracking.manifest import MANIFEST_FILE, write_manifest

FLAVOR_NAME = "smp_ensemble"
LOADER_MODULE = "smp_ensemble.tracking.flavor"
CODE_FOLDER = "code"
MLMODEL_FILE = "MLmodel"
REQUIREMENTS_FILE = "requirements.txt"
PYTHON_ENV_FILE = "python_env.yaml"

# All that prediction imports; training needs more.
REQUIREMENTS = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "safetensors",
    "scipy",
    "segmentation-models-pytorch",
    "timm",
    "torch",
    "torchvision",  # smp and our FCN import it, and each release fits one torch
)

SIGNATURES = ("params", "arrays", "images")


def requirements() -> list[str]:
    """What a saved model needs, pinned to what is installed here."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def signature_of(kind: str, in_channels: int) -> ModelSignature:
    """The model's signature.

    MLflow cannot express arrays and a column of image bytes at once. `params`, the default, leaves the input open and
    checks params; the input is checked here, as strictly. `arrays` and `images` fix one, for registries that ask.

    Raises:
        ConfigError: Unknown kind.
    """
    params = ParamSchema(
        [
            ParamSpec("kind", DataType.string, DEFAULT_KIND),
            ParamSpec("views", DataType.string, OWN),
            ParamSpec("passes", DataType.long, 1),
            ParamSpec("on_error", DataType.string, RAISE),
            ParamSpec("adaptive", DataType.boolean, False),
        ]
    )
    match kind:
        case "params":
            return ModelSignature(params=params)
        case "arrays":
            inputs = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, in_channels))])
        case "images":
            inputs = Schema([ColSpec(DataType.binary, "image")])
        case _:
            raise ConfigError(f"unknown signature '{kind}': {nearest(kind, SIGNATURES)}")
    return ModelSignature(inputs=inputs, outputs=Schema([ColSpec(AnyType())]), params=params)


def _copy_code(folder: Path) -> None:
    """Our modules, and the entry points by which built-ins are found, as an installed distribution holds them."""
    package = Path(__file__).parents[1]
    shutil.copytree(
        package,
        folder / package.name,
        ignore=lambda _, names: [name for name in names if name == "__pycache__"],
    )
    try:
        installed = distribution("smp-ensemble")
    except PackageNotFoundError as error:
        raise ConfigError("smp_ensemble is not installed: run `pip install -e .` in its folder") from error
    info = folder / f"smp_ensemble-{installed.version}.dist-info"
    info.mkdir()
    # METADATA of a wheel, PKG-INFO of a source tree.
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text(installed.read_text("entry_points.txt") or "", encoding="utf-8")


def complete(folder: Path, *, model: Model | None = None, signature: str = "params") -> Model:
    """Turns a folder with `ensemble.json` and its members into an MLflow model, in place; safe to repeat.

    The last file is the list of all others with their SHA-256.

    Args:
        folder: As `artifact.save_ensemble` wrote it.
        model: MLflow's description, with ids where the model is tracked; None: a fresh one.
        signature: One of `SIGNATURES`.
    """
    spec = artifact.read_spec(folder)
    model = model or Model()
    model.signature = signature_of(signature, spec.in_channels)
    code = folder / CODE_FOLDER
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir()
    _copy_code(code)
    (folder / REQUIREMENTS_FILE).write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    (folder / PYTHON_ENV_FILE).write_text(
        f"build_dependencies:\n- pip\n- setuptools\n- wheel\ndependencies:\n- -r {REQUIREMENTS_FILE}\n",
        encoding="utf-8",
    )
    model.flavors.clear()
    mlflow.pyfunc.add_to_model(model, loader_module=LOADER_MODULE, code=CODE_FOLDER, python_env=PYTHON_ENV_FILE)
    model.add_flavor(
        FLAVOR_NAME,
        mode=spec.mode,
        class_names=list(spec.class_names),
        in_channels=spec.in_channels,
        members=len(spec.members),
        ensemble_sha256=artifact.file_sha256(folder / artifact.ENSEMBLE_FILE),
        code=CODE_FOLDER,
        manifest=MANIFEST_FILE,
    )
    model.save(str(folder / MLMODEL_FILE))
    write_manifest(folder)
    return model
