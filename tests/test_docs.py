"""The documents keep up with the code: tables, pictures, links, commands and Python in them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import smp_ensemble
from smp_ensemble import cli
from smp_ensemble.testing import check_trainer
from smp_ensemble.training.trainers import make_trainer
from smp_ensemble.workflows.training import method_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
CARDS = sorted((DOCS / "methods").glob("*.md"))
HEADINGS = (
    "What it does", "When it helps, and when it does not", "Cost", "Hyper-parameters and advice", "How to",
    "Pitfalls we avoid", "Reference",
)  # fmt: skip


def load(name: str):
    """A module beside the documents; their folder is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


tables = load("method_tables")
plots = load("schedule_plots")
TRAINERS = tables.trainers()

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
every_card = pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
every_trainer = pytest.mark.parametrize("name", TRAINERS)


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that headings of a page have."""
    headings = re.findall(r"^#+ (.*)$", without_fences(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path) -> list[str]:
    """Command lines in the code blocks of a page."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    fenced = re.findall(r"^```(?!python)\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line for line in without_fences(text).splitlines() if line.startswith("    ")]
    stripped = (line.strip().removeprefix("$ ") for line in lines)
    typed = [line for line in stripped if line.startswith(("smp-ensemble ", "mlflow run . "))]
    return [line for line in typed if "COMMAND" not in line and " | " not in line]  # a pattern, or a drawing


def pythons(path: Path) -> list[str]:
    """Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def parse(line: str):
    """The options that a command line gives; raises as the command would."""
    words = shlex.split(line, comments=True)
    if words[0] == "smp-ensemble":
        parsed = cli.build_parser().parse_args(words[1:])
        typed = {name: value for name, value in vars(parsed).items() if name not in {"command", "json", "debug"}}
        return cli.parse_options(cli.COMMANDS[parsed.command].options, typed)
    entry, typed = "main", {}
    for flag, value in zip(words[3::2], words[4::2], strict=True):
        if flag == "-e":
            entry = value
        elif flag == "-P":
            name, _, text = value.partition("=")
            typed[name] = text
        else:
            assert (flag, value) == ("--env-manager", "local")
    known = {option.name for option in fields(cli.COMMANDS[entry].options)}
    assert set(typed) <= known
    return cli.parse_options(cli.COMMANDS[entry].options, typed)


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: path.stem)
def test_tables_follow_from_the_code(path):
    assert path.read_text(encoding="utf-8") == tables.pages()[path], "run: python docs/generate.py"


@every_trainer
def test_every_trainer_of_ours_has_a_card_with_its_picture_and_reference(name):
    card = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    kind = TRAINERS[name]
    assert kind.name == name
    assert f"](../images/schedules/{name}.png)" in card
    assert re.sub(r"\[(arXiv:[\d.]+)\]\([^)]*\)", r"\1", card).find(f"{kind.reference}.") > 0
    assert f"| [{name}](methods/{name}.md) | `trainers.{kind.__name__}` |" in (DOCS / "methods.md").read_text("utf-8")
    check_trainer(kind())


@every_trainer
def test_every_option_in_a_trainers_table_is_taken_by_it(name):
    table = tables.trainer_options(TRAINERS[name])
    named = dict(re.findall(r"^\| `(\w+)` \| \w+ \| `([^`]+)` \|", table, re.MULTILINE))
    assert make_trainer(name, {option: ast.literal_eval(value) for option, value in named.items()}) == TRAINERS[name]()
    assert list(named) == [known.name for known in fields(TRAINERS[name])]
    assert all(row.count("|") == 5 and not re.search(r"\|\s*\|", row) for row in table.splitlines())


@every_trainer
def test_pictures_show_the_schedules_as_they_are(name):
    trainer, steps = TRAINERS[name](), tables.PLOT_STEPS
    schedule = trainer.schedule(tables.PLOT_EPOCHS, steps)
    averaged = tables.averaged_epochs(trainer, tables.PLOT_EPOCHS, steps)
    expected = plots.fingerprint(schedule, averaged)
    assert plots.drawn(plots.FOLDER / f"{name}.png") == expected, "run: python docs/generate.py"


def test_pictures_are_small_and_no_one_is_left_over():
    found = {path.stem: path.stat().st_size for path in plots.FOLDER.iterdir()}
    assert set(found) == set(TRAINERS)
    assert sum(found.values()) < 300_000


def test_a_picture_is_drawn_anew_when_its_schedule_changes(tmp_path):
    slow, fast = (make_trainer("fge", {"start": start}) for start in (0.0, 0.5))
    path = tmp_path / "fge.png"
    assert plots.drawn(path) is None
    plots.draw(slow.schedule(6, 2), 2, (), path)
    assert plots.drawn(path) == plots.fingerprint(slow.schedule(6, 2), ()) != plots.fingerprint(fast.schedule(6, 2), ())
    assert plots.fingerprint(slow.schedule(6, 2), ()) != plots.fingerprint(slow.schedule(6, 2), (5.0, 6.0))


def test_averaged_epochs_by_hand():
    assert tables.averaged_epochs(make_trainer("swa", {"start": 0.5, "cycle_epochs": 2}), 8, 3) == (4, 6, 8)
    assert tables.averaged_epochs(make_trainer("ema"), 2, 2) == (0.5, 1, 1.5, 2)
    assert tables.averaged_epochs(make_trainer("single"), 8, 3) == ()


def test_markers_and_tables_belong_together():
    page = "a\n<!-- generated: one -->\nold\n<!-- end -->\nb"
    assert tables.fill(page, {"one": "new"}) == "a\n<!-- generated: one -->\n\nnew\n\n<!-- end -->\nb"
    assert tables.fill(tables.fill(page, {"one": r"\1"}), {"one": "new"}) == tables.fill(page, {"one": "new"})
    for wrong in ({}, {"two": "new"}, {"one": "new", "two": "new"}):
        with pytest.raises(ValueError, match="expected a place for each"):
            tables.fill(page, wrong)


@every_card
def test_cards_have_one_form(path):
    text = path.read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (.*)$", without_fences(text), re.MULTILINE)) == HEADINGS
    assert text.startswith(f"# {path.stem}: ")
    assert f"](methods/{path.name})" in (DOCS / "methods.md").read_text(encoding="utf-8")
    assert pythons(path)
    typed = commands(path)
    assert any(line.startswith("smp-ensemble ") for line in typed)
    assert any(line.startswith("mlflow run ") for line in typed)


@every_page
def test_relative_links_lead_somewhere(path):
    text = without_fences(path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), f"{path.name} links to {target}"
        assert found.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(found), f"{path.name} links to {target}"


@every_page
def test_commands_can_be_typed(path):
    for line in commands(path):
        options = parse(line)
        if hasattr(options, "trainer"):
            assert method_of(options).schedule(options.epochs, 10).total_steps == 10 * options.epochs


@every_page
def test_python_uses_what_there_is(path):
    for block in pythons(path):
        tree = ast.parse(block, str(path))
        compile(tree, str(path), "exec")
        for node in ast.walk(tree):
            called = resolve(node.func) if isinstance(node, ast.Call) else resolve(node)
            if called is not None and isinstance(node, ast.Call) and node.keywords:
                known = inspect.signature(called).parameters
                assert {keyword.arg for keyword in node.keywords} <= set(known), ast.unparse(node)


def resolve(node: ast.AST):
    """The object of our own that an expression like `smp_ensemble.trainers.SSE` names, or None."""
    if isinstance(node, ast.Name):
        return smp_ensemble if node.id == "smp_ensemble" else None
    owner = resolve(node.value) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


def test_the_map_names_every_file():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    modules = {path for path in (ROOT / "smp_ensemble").rglob("*.py") if path.name != "__init__.py"}
    commands_ = {path.stem for path in modules if path.parent.name == "workflows"}
    missing = [
        path.relative_to(ROOT).as_posix()
        for path in sorted(modules)
        if f"`{path.name}`" not in text and not (path.stem in commands_ and f"`{path.stem}`" in text)
    ]
    assert not missing, f"docs/architecture.md lacks a row for {missing}"
