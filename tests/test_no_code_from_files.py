"""Nothing that is read is executed: no pickle, no eval, no unsafe loader, anywhere in the package and its projects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FILES = sorted(path for folder in ("smp_ensemble", "mlflow_projects") for path in (REPOSITORY / folder).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "imp", "runpy"}
NAMES = {"eval", "exec", "compile", "__import__"}
ENDS = (
    "os.system", "os.popen", "torch.jit.load", "jit.load", "torch.hub.load", "hub.load", "pyfunc.load_model",
    "read_pickle", "to_pickle", "load_from_checkpoint", "importlib.import_module", "import_module",
)  # fmt: skip
ALLOWED = {
    ("smp_ensemble/inference/export.py", "torch.export.load"),  # written a moment before, by the same process
    ("smp_ensemble/__init__.py", "import_module"),  # names of our own modules, from a table in the file
    ("smp_ensemble/cli.py", "importlib.import_module"),
    ("mlflow_projects/aerial_buildings/aerial_buildings.py", "mlflow.pyfunc.load_model"),  # what it has just trained
    ("mlflow_projects/benchmark/speed.py", "mlflow.pyfunc.load_model"),
    ("mlflow_projects/benchmark/main.py", "importlib.import_module"),
}


def full_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_constant(value: ast.expr | None, expected: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is expected


def found_in(source: str) -> list[str]:
    """What a source holds that may execute what it reads: one entry for each place."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name = full_name(node.func)
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            last = name.rpartition(".")[2]
            owner = name.split(".")[0]
            if (
                name in NAMES
                or any(name == end or name.endswith(f".{end}") for end in ENDS)
                or (name == "torch.load" and not is_constant(options.get("weights_only"), True))
                or ("ckpt_path" in options and not is_constant(options.get("weights_only"), True))
                or (name == "torch.export.load")
                or (owner in {"np", "numpy"} and last == "load" and "allow_pickle" in options
                    and not is_constant(options["allow_pickle"], False))
                or (owner in {"yaml", "ruamel"} and "load" in last and last not in {"safe_load", "safe_load_all"})
                or ("shell" in options and not is_constant(options["shell"], False))
                or ("trust_remote_code" in options and not is_constant(options["trust_remote_code"], False))
            ):  # fmt: skip
                found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_module_executes_what_it_reads(path):
    place = path.relative_to(REPOSITORY).as_posix()
    assert [name for name in found_in(path.read_text(encoding="utf-8")) if (place, name) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, dill",
        "from joblib.numpy_pickle import load",
        "eval('1')",
        "def f():\n    exec(text)",
        "__import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "trainer.fit(module, ckpt_path=path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "torch.jit.load(path)",
        "torch.export.load(path)",
        "pd.read_pickle(path)",
        "mlflow.pyfunc.load_model(uri)",
        "importlib.import_module(name)",
        "Module.load_from_checkpoint(path)",
    ],
)
def test_the_check_finds_each(source):
    assert len(found_in(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "np.load(path)",
        "yaml.safe_load(text)",
        "network.eval()",
        "re.compile(text)",
        "json.loads(text)",
        "subprocess.run([command])",
    ],
)
def test_the_check_lets_what_is_safe_pass(source):
    assert found_in(source) == []
