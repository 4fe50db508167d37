"""An ensemble as one file that runs without this package: ONNX or torch.export's archive, checked beforehand."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.export_check import Comparison, compare, random_batches
from smp_ensemble.inference.graph import SMALLEST, EnsembleGraph, trace
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.export import ExportedProgram

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.inference.export_check import Run

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
"""Formats, and how their files are called."""

OPSETS = range(18, 24)
"""Versions of ONNX's operators that torch writes itself."""

METADATA = "smp_ensemble"
"""What the file says of itself, as JSON: a key of ONNX's metadata, the extra file `smp_ensemble.json` of a .pt2."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_LIMIT_BYTES = 2**31 - 2**26
"""Of weights in one ONNX file: a protocol buffer ends at 2 GiB."""


@dataclass(frozen=True)
class Export:
    """A file that was written and checked.

    Attributes:
        path: The file.
        metadata: What it says of itself.
        comparison: With the engine, in float32 on this CPU.
        seconds: To trace and to write; the check is not in it.
    """

    path: Path
    metadata: dict[str, Any]
    comparison: Comparison
    seconds: float


def check_target(path: Path, format_name: str, opset: int) -> None:
    """What can be refused before a model is loaded.

    Raises:
        ConfigError: Unknown format or opset, missing packages, another suffix than the format's, or something is there.
    """
    if format_name not in SUFFIXES:
        raise ConfigError(f"unknown format '{format_name}': {nearest(format_name, SUFFIXES)}")
    if format_name == "onnx":
        missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"format onnx needs {', '.join(missing)}: pip install 'smp-ensemble[export]'")
        if opset not in OPSETS:
            raise ConfigError(f"expected an opset from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if path.suffix != SUFFIXES[format_name]:
        raise ConfigError(f"expected an output that ends in {SUFFIXES[format_name]} for {format_name}, got '{path}'")
    if path.exists():
        raise ConfigError(f"{path} exists already: choose another output, or delete it")


def export_ensemble(
    ensemble: Ensemble,
    path: Path,
    *,
    format_name: str = "onnx",
    views: str | Sequence[str] | None = None,
    opset: int = OPSETS[0],
    check_images: int = 10,
    sha256: str = "",
) -> Export:
    """Writes the ensemble as one graph and compares it with `Engine` before the file is put in its place.

    The graph takes raw pixel values `(N, C, H, W)`, float32, with H and W multiples of the stride from two strides on,
    and gives probabilities `(N, K, H, W)`. Thresholds, rejection and post-processing are not in it; the metadata has
    them. Dropout is off: Monte Carlo passes are not exported.

    Args:
        ensemble: Of `Member`s. Is moved to the CPU.
        path: New; its folder is made where there is none.
        format_name: `onnx` or `torch-export`.
        views: In place of the ensemble's own; without scales.
        opset: Version of ONNX's operators.
        check_images: At least so many random images are compared.
        sha256: Of the `ensemble.json` that the ensemble came from, for the metadata.

    Raises:
        ConfigError: As `check_target`; views with scales; members without a normalisation; too many weights for ONNX.
        NetworkError: torch cannot trace the ensemble, or the file does not give what the engine gives.
    """
    check_target(path, format_name, opset)
    started = time.perf_counter()
    graph = EnsembleGraph(ensemble, views)
    metadata = {**_metadata(graph), "ensemble_sha256": sha256}
    if format_name == "onnx":
        _check_size(graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        staged = Path(folder) / path.name
        program = trace(graph)
        if format_name == "onnx":
            _write_onnx(program, staged, json.dumps(metadata), opset)
        else:
            extra = {f"{METADATA}.json": json.dumps(metadata)}
            torch.export.save(program, staged, extra_files=extra)
        seconds = time.perf_counter() - started
        run = open_onnx(staged) if format_name == "onnx" else open_program(staged)
        engine = Engine(ensemble, "cpu", "32", views=graph.views)
        batches = random_batches(ensemble, graph.in_channels, graph.stride, check_images)
        comparison = compare(engine, run, batches)
        staged.replace(path)
    return Export(path, metadata, comparison, seconds)


def _metadata(graph: EnsembleGraph) -> dict[str, Any]:
    ensemble = graph.ensemble
    return {
        "input": "images: raw pixel values, float32, (N, C, H, W); H and W multiples of stride, at least smallest_side",
        "output": "probabilities: float32, (N, K, H, W)",
        "mode": ensemble.mode,
        "class_names": list(ensemble.class_names),
        "in_channels": graph.in_channels,
        "stride": graph.stride,
        "smallest_side": SMALLEST * graph.stride,
        "members": len(ensemble.members),
        "combiner": ensemble.combiner,
        "weights": list(ensemble.weights),
        "views": list(graph.views),
        "temperature": ensemble.temperature,
        "threshold": 0.5 if ensemble.votes else ensemble.threshold,
        "reject": ensemble.reject,
        "postprocess": ensemble.postprocess.to_dict(),
    }


def _check_size(graph: EnsembleGraph) -> None:
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if size > ONNX_LIMIT_BYTES:
        raise ConfigError(
            f"the weights take {size / 2**30:.2f} GiB, one ONNX file holds at most {ONNX_LIMIT_BYTES / 2**30:.2f} GiB: "
            "use format torch-export, or fewer members"
        )


def _write_onnx(program: ExportedProgram, path: Path, metadata: str, opset: int) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["probabilities"],
        verbose=False,
    )
    assert written is not None  # with dynamo it is a program
    for node in written.model.graph:
        node.metadata_props.clear()  # where in the source each operation came from: half of the file
    written.model.metadata_props[METADATA] = metadata
    written.save(path)


def open_onnx(path: Path) -> Run:
    """Runs an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def open_program(path: Path) -> Run:
    """Runs a .pt2 file on the CPU. torch.export.load trusts its file: only for one that was just written."""
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            found = module(images)
        assert isinstance(found, Tensor)
        return found

    return run
