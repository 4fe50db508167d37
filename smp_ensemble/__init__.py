"""Ensembles for semantic segmentation: the public API and nothing else.

Names are imported when they are first used: training needs Lightning and prediction does not, and `import smp_ensemble`
needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smp_ensemble.data.forms import DataSplits as DataSplits
    from smp_ensemble.data.forms import load_data as load_data
    from smp_ensemble.data.normalization import Normalization as Normalization
    from smp_ensemble.ensembling.ensemble import Ensemble as Ensemble
    from smp_ensemble.ensembling.member import Member as Member
    from smp_ensemble.ensembling.postprocessing import PostProcessing as PostProcessing
    from smp_ensemble.inference.engine import Engine as Engine
    from smp_ensemble.tracking.flavor import load_model as load_model
    from smp_ensemble.tracking.flavor import log_model as log_model
    from smp_ensemble.tracking.flavor import save_model as save_model
    from smp_ensemble.tracking.search import search_snapshots as search_snapshots
    from smp_ensemble.tracking.store import MlflowStore as MlflowStore
    from smp_ensemble.tracking.store import log_snapshot as log_snapshot
    from smp_ensemble.training import schedules as schedules
    from smp_ensemble.training import trainers as trainers
    from smp_ensemble.training.batch_norm import refresh_batch_norm as refresh_batch_norm
    from smp_ensemble.training.callback import SnapshotCallback as SnapshotCallback
    from smp_ensemble.training.fit import fit as fit
    from smp_ensemble.training.fit_options import FitOptions as FitOptions
    from smp_ensemble.training.weights import average_weights as average_weights
    from smp_ensemble.typing import Snapshot as Snapshot
    from smp_ensemble.workflows.assembling import build_ensemble as build_ensemble

_WHERE = {
    "DataSplits": "data.forms",
    "load_data": "data.forms",
    "Normalization": "data.normalization",
    "Ensemble": "ensembling.ensemble",
    "Member": "ensembling.member",
    "PostProcessing": "ensembling.postprocessing",
    "Engine": "inference.engine",
    "search_snapshots": "tracking.search",
    "load_model": "tracking.flavor",
    "log_model": "tracking.flavor",
    "save_model": "tracking.flavor",
    "MlflowStore": "tracking.store",
    "log_snapshot": "tracking.store",
    "schedules": "training",
    "trainers": "training",
    "refresh_batch_norm": "training.batch_norm",
    "SnapshotCallback": "training.callback",
    "FitOptions": "training.fit_options",
    "fit": "training.fit",
    "average_weights": "training.weights",
    "Snapshot": "typing",
    "build_ensemble": "workflows.assembling",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605 (a list of the names above)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'smp_ensemble' has no attribute '{name}'")
    module = import_module(f"smp_ensemble.{_WHERE[name]}")
    if name in {"schedules", "trainers"}:
        return import_module(f"{module.__name__}.{name}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
