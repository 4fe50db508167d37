"""Imports run one way, and each large dependency is known to one place.

The linter bans the dependencies everywhere but in their place; this holds what it cannot say: which package may import
which, and that `training` knows Lightning and not MLflow.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "smp_ensemble"

BASE = {"typing", "exceptions", "registry", "architectures", "dropout", "fcn", "precision", "testing", "durable"}
BASE |= {"untrusted", "budget", "locks"}
MAY_IMPORT = {
    "data": set(),
    "metrics": set(),
    "training": {"data", "metrics"},
    "ensembling": {"data", "metrics"},
    "inference": {"data", "metrics", "ensembling"},
    "evaluation": {"data", "metrics", "ensembling", "inference"},
    "tracking": {"data", "metrics", "ensembling", "inference", "evaluation"},
    "workflows": {"data", "metrics", "training", "ensembling", "inference", "evaluation", "tracking"},
}
ONLY_IN = {
    "mlflow": {"tracking"},
    "lightning": {"training"},
    "albumentations": {"data/transforms.py"},
    "torchvision": {"fcn.py"},
    "onnxruntime": {"inference/export.py"},
    "pickle": set(),
}


def imports(path: Path, *, at_run_time: bool) -> set[str]:
    """Full names of the modules that a file imports anywhere; without those for type checkers, if asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_packages_import_one_way(path):
    own = path.relative_to(PACKAGE).parts[0]
    others = {name.split(".")[1] for name in imports(path, at_run_time=True) if name.startswith("smp_ensemble.")}
    assert others - BASE - {own} <= MAY_IMPORT[own]


@pytest.mark.parametrize("dependency", ONLY_IN)
def test_each_dependency_has_its_place(dependency):
    allowed = ONLY_IN[dependency]
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place in allowed or place.split("/")[0] in allowed:
            continue
        assert dependency not in {name.split(".")[0] for name in imports(path, at_run_time=False)}, place
