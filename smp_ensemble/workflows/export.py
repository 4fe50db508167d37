"""`export`: any model of ours as one file that runs without this package, once it gives what the engine gives."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.artifact import ENSEMBLE_FILE, file_sha256
from smp_ensemble.ensembling.views import OWN, check_views
from smp_ensemble.inference.export import SUFFIXES, check_target, export_ensemble
from smp_ensemble.inference.export_check import TOLERANCE
from smp_ensemble.tracking.flavor import load_model, local_folder
from smp_ensemble.workflows.results import Report

if TYPE_CHECKING:
    from smp_ensemble.inference.export import Export
    from smp_ensemble.workflows.options import ExportOptions


def export(options: ExportOptions) -> Report:
    """Writes the file that `options.output` names, once it gives what the engine gives.

    Raises:
        ConfigError: No such model, format, opset or views; the output is there already; packages are missing.
        NetworkError: The model cannot be traced, or the file gives something else than the engine.
        IntegrityError: A file of the model is missing or changed.
    """
    path = Path(options.output or f"ensemble{SUFFIXES.get(options.format, '')}")
    check_target(path, options.format, options.opset)
    if options.views != OWN:
        check_views(options.views)  # before anything is loaded
    folder = local_folder(options.model)
    found = export_ensemble(
        load_model(str(folder)),
        path,
        format_name=options.format,
        views=options.views,
        opset=options.opset,
        check_images=options.check_images,
        sha256=file_sha256(folder / ENSEMBLE_FILE),
    )
    return _report(found)


def _report(found: Export) -> Report:
    told, compared = found.metadata, found.comparison
    size = found.path.stat().st_size
    lines = [
        f"{found.path}: {told['members']} members, views {'+'.join(told['views'])}, combiner {told['combiner']}; "
        f"{size / 1e6:.1f} MB, written in {found.seconds:.0f} s",
        f"largest difference from the engine: {compared.difference:.2g} in probability (allowed: {TOLERANCE:g}), "
        f"on {compared.images} random images",
        f"takes raw pixel values (N, {told['in_channels']}, H, W), float32, H and W multiples of {told['stride']} from "
        f"{told['smallest_side']} on; gives probabilities. Thresholds and post-processing are in its metadata alone",
    ]
    if compared.undecided:
        lines.insert(
            2, f"{100 * compared.undecided:.2g} % of the pixels left out: rounding decides a member's vote there"
        )
    values = {
        "output": str(found.path),
        "bytes": size,
        "seconds": found.seconds,
        **asdict(compared),
        "metadata": told,
    }
    return Report(values, (), lines)
