"""A study as it is declared in YAML, and the cells that it consists of: one training each, named so that rows last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

TUNE, RUN, REFERENCE, STUDENT = "tune", "run", "reference", "student"
"""Stages: recipes tried for each method; what is reported; ensembles of several trainings, at several budgets; one
network that learns from such an ensemble.
"""

SEEDS = "seeds"
BASELINE = "single"
STUDENT_SEED = 1000
"""Is added to a student's seed: it begins where none of its teachers began."""


@dataclass(frozen=True)
class Method:
    """A training method as a study compares it.

    Attributes:
        name: Its row's name; one trainer may be there with several options.
        trainer: In the entry-point group `smp_ensemble.trainers`.
        options: Of the trainer.
        turn: Methods of turn 0 are run with all seeds before those of turn 1 begin.
        seeds: It is trained with the first so many of the study's seeds; None: with all.
        recipe_of: The method whose recipe it takes; empty: its own is tuned.
    """

    name: str
    trainer: str
    options: dict[str, Any] = field(default_factory=dict)
    turn: int = 0
    seeds: int | None = None
    recipe_of: str = ""


@dataclass(frozen=True)
class Study:
    """What is compared, on what, how often.

    Attributes:
        name: Of the file of its rows.
        about: What is particular about it, in a few words.
        data: As for `smp-ensemble train`; relative paths are relative to the study's file.
        mask_column: Of `splits.csv`.
        train_share: Share of the training images that are used, evenly over their names.
        watched: So many validation images are scored after each epoch, for the curves alone; 0: all.
        folds: The data's groups are divided into so many; each is test data once, and the next one validation data.
        methods: What is compared; `single` is the baseline.
        epochs: Budgets: each method trains so many epochs, with equal batches, so equally many optimizer steps.
        seeds: Of the trainings.
        grid: Recipes, such as `{"optimizer": "sgd", "lr": 0.1}`: each method gets the one that is best on validation
            data, from the same grid. One recipe alone is not tuned.
        tune_folds: Folds that recipes are tried on; a test fold never judges the recipes of its own cells.
        tune_seed: Seed of these trainings, which is none of the reported ones.
        fixed: Options that all trainings share: `batch_size`, `crop_size`, `augment`, `weight_decay`, ...
        arch: Architecture.
        encoder_name: Its encoder, from scratch.
        model_options: More of the architecture's options, such as `decoder_channels`.
        corruptions: Names of corruptions that the test images get as well.
        crop_statistics: Whether averages are scored with batch norm measured on augmented crops too, and the mean of
            all with that of each member measured anew.
        flips: Whether the last snapshot is scored over four flips too.
        fixed_recipe: Recipes given by method, where nothing is tuned here.
        reference_seeds: The reference is the mean of the trainings with the first so many seeds; below 2: none.
        students: Networks that learn from the reference, trained as `single` is: by name, `alpha` (share of the masks
            in the loss) and `soften`.
        student_seeds: Each student is trained with the first so many seeds.
    """

    name: str
    data: str
    methods: tuple[Method, ...]
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    grid: tuple[dict[str, Any], ...]
    about: str = ""
    mask_column: str = "mask"
    train_share: float = 1.0
    watched: int = 0
    folds: int = 5
    tune_folds: tuple[int, ...] = (0, 2)
    tune_seed: int = 100
    fixed: dict[str, Any] = field(default_factory=dict)
    arch: str = "unet"
    encoder_name: str = "resnet18"
    model_options: dict[str, Any] = field(default_factory=dict)
    corruptions: tuple[str, ...] = ("noise", "blur", "brightness", "jpeg")
    crop_statistics: bool = False
    flips: bool = True
    fixed_recipe: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference_seeds: int = 3
    students: dict[str, dict[str, Any]] = field(default_factory=dict)
    student_seeds: int = 3


@dataclass(frozen=True)
class Cell:
    """One training of a study, or one ensemble of several trainings.

    Attributes:
        method: Its name in the study, `seeds`, or a student's name.
        stage: `tune`, `run`, `reference` or `student`.
        epochs: Budget.
        fold: Which fold is test data.
        seed: Of the training; -1 for a reference, which has all.
        recipe: Place in the study's grid; -1: the one that tuning chose.
    """

    method: str
    stage: str
    epochs: int
    fold: int
    seed: int
    recipe: int = -1

    @property
    def student(self) -> bool:
        """Whether it learns from a reference."""
        return self.stage == STUDENT

    @property
    def id(self) -> str:
        """Unique in its study, and the same for ever: rows are found by it."""
        recipe = f"-r{self.recipe}" if self.recipe >= 0 else ""
        return f"{self.stage}-{self.method}-e{self.epochs}-f{self.fold}-s{self.seed}{recipe}"


def _declared(path: Path) -> dict[str, Any]:
    """What a file says, on top of what its `base` says, a study in the same folder; each entry is replaced whole."""
    own: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = own.pop("base", None)
    return own if base is None else _declared(path.with_name(f"{base}.yaml")) | own


def read_study(path: Path) -> Study:
    """Reads a study.

    Raises:
        ValueError: It names no method `single`, or something is missing or unknown.
        FileNotFoundError: Its base is not there.
    """
    declared = _declared(path)
    methods = tuple(Method(name, **values) for name, values in declared.pop("methods").items())
    if BASELINE not in {method.name for method in methods}:
        raise ValueError(f"{path}: expected a method '{BASELINE}' to compare with, got {[one.name for one in methods]}")
    data = declared.pop("data")
    if not data.startswith("synthetic"):
        data = str((path.parent / data).resolve())
    lists = {name: tuple(values) for name, values in declared.items() if isinstance(values, list)}
    rest = {name: value for name, value in declared.items() if name not in lists}
    try:
        study = Study(path.stem, data, methods, **lists, **rest)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    if study.tune_seed in study.seeds:
        raise ValueError(f"{path}: tune_seed {study.tune_seed} is one of the seeds that are reported: choose another")
    if study.reference_seeds > len(study.seeds):
        raise ValueError(f"{path}: reference_seeds {study.reference_seeds} are more than {len(study.seeds)} seeds")
    if study.students and study.reference_seeds < 2:
        raise ValueError(f"{path}: students learn from the reference: expected reference_seeds of 2 or more")
    return study


def reference_cells(study: Study, cell: Cell) -> list[Cell]:
    """The trainings that a reference is made of, from which its students learn."""
    baseline = next(method.name for method in study.methods if method.trainer == BASELINE)
    return [Cell(baseline, RUN, cell.epochs, cell.fold, seed) for seed in study.seeds[: study.reference_seeds]]


def cells_of(study: Study) -> list[Cell]:
    """All cells in the order in which they are run: tuning, then turn by turn and seed by seed.

    References come as soon as the trainings are there that they are made of.
    """
    found = []
    if len(study.grid) > 1:
        found += [
            Cell(method.name, TUNE, epochs, fold, study.tune_seed, recipe)
            for method in sorted(study.methods, key=lambda method: method.turn)
            if method.name not in study.fixed_recipe and not method.recipe_of
            for epochs in study.epochs
            for fold in study.tune_folds
            for recipe in range(len(study.grid))
        ]
    for turn in sorted({method.turn for method in study.methods}):
        for place, seed in enumerate(study.seeds):
            found += [
                Cell(method.name, RUN, epochs, fold, seed)
                for epochs in study.epochs
                for method in study.methods
                for fold in range(study.folds)
                if method.turn == turn and (method.seeds is None or place < method.seeds)
            ]
            if turn == 0 and study.reference_seeds > 1 and seed == study.seeds[study.reference_seeds - 1]:
                found += [
                    Cell(SEEDS, REFERENCE, epochs, fold, -1) for epochs in study.epochs for fold in range(study.folds)
                ]
                found += [
                    Cell(name, STUDENT, epochs, fold, seed)
                    for seed in study.seeds[: study.student_seeds]
                    for epochs in study.epochs
                    for name in study.students
                    for fold in range(study.folds)
                ]
    return found


def recipe_for(cell: Cell, study: Study, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The recipe of a cell: its own in the grid, or the best on validation data; None while that is not known.

    A recipe is judged by what its method reports, on the tuning folds whose validation data are not the cell's test
    data. (Fold f is test data in cell f; its tuning cells are validated on fold f + 1.) A student takes that of the
    baseline.
    """
    if cell.recipe >= 0:
        return study.grid[cell.recipe]
    named = {method.name: method.recipe_of or method.name for method in study.methods}
    cell = replace(cell, method=BASELINE if cell.student else named[cell.method])
    if cell.method in study.fixed_recipe:
        return study.fixed_recipe[cell.method]
    if len(study.grid) == 1:
        return study.grid[0]
    judges = [fold for fold in study.tune_folds if (fold + 1) % study.folds != cell.fold] or list(study.tune_folds)
    scores = []
    for recipe in range(len(study.grid)):
        tried = [rows.get(Cell(cell.method, TUNE, cell.epochs, fold, study.tune_seed, recipe).id) for fold in judges]
        if any(row is None for row in tried):
            return None
        scores.append(sum(row["reported_val_iou"] for row in tried if row is not None) / len(tried))
    return study.grid[max(range(len(scores)), key=lambda recipe: scores[recipe])]


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Finished rows by their cell's id; a line that was cut off is not one."""
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows[row["id"]] = row
    return rows


def append_row(path: Path, cell: Cell, values: dict[str, Any]) -> dict[str, Any]:
    """Adds a finished cell's row to the file, as one line."""
    row = {"id": cell.id, **asdict(cell), **values}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")
    return row
