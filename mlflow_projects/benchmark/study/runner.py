"""Runs a study's cells, several at a time, each at most once; what is finished is a line on disk."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from study.cell import run_cell
from study.folds import load_whole
from study.plan import REFERENCE, STUDENT, Cell, Study, append_row, cells_of, read_rows, recipe_for, reference_cells

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from study.networks import Setting

logger = logging.getLogger(__name__)
_loaded: dict[tuple[str, str], Any] = {}


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        finished: Rows that are there.
        total: Cells.
        failed: Cells that raised in this call, with the reason.
    """

    finished: int
    total: int
    failed: dict[str, str]


def run_study(
    study: Study,
    rows_path: Path,
    setting: Setting,
    *,
    jobs: int = 1,
    seconds: float | None = None,
    select: Callable[[Cell], bool] | None = None,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> Progress:
    """Runs all cells that have no row yet.

    Args:
        study: What to run.
        rows_path: One line for each finished cell; read first, and added to.
        setting: Where cells run.
        jobs: Processes.
        seconds: After that no cell is started, and those in hand are left; None: no limit.
        select: Which cells to run; None: all.
        finished: Is told of each new row.
    """
    began = time.monotonic()
    rows = read_rows(rows_path)
    cells = cells_of(study)
    waiting = [cell for cell in cells if cell.id not in rows and (select is None or select(cell))]
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet)
    running: dict[concurrent.futures.Future[dict[str, Any]], Cell] = {}
    try:
        while waiting or running:
            left = None if seconds is None else seconds - (time.monotonic() - began)
            if left is not None and left <= 0:
                break
            for cell in list(waiting):
                if len(running) >= jobs:
                    break
                recipe = {} if cell.stage == REFERENCE else recipe_for(cell, study, rows)
                if recipe is None or (cell.stage in {REFERENCE, STUDENT} and _unmet(cell, study, waiting, running)):
                    continue
                waiting.remove(cell)
                running[pool.submit(_run, cell, study, recipe, setting)] = cell
            if not running:
                break  # what is left waits for cells that were not selected, or failed
            done, _ = concurrent.futures.wait(running, timeout=left, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                try:
                    values = future.result()
                except Exception as error:  # noqa: BLE001 (one cell must not end the others)
                    failed[cell.id] = f"{type(error).__name__}: {error}"
                    logger.warning("%s failed: %s", cell.id, failed[cell.id])
                    continue
                rows[cell.id] = append_row(rows_path, cell, values)
                if finished is not None:
                    finished(rows[cell.id])
                logger.info(
                    "%d of %d: %s, val IoU %.4f, %.0f s since the start",
                    len(rows), len(cells), cell.id, values["reported_val_iou"], time.monotonic() - began,
                )  # fmt: skip
    finally:
        for process in list(getattr(pool, "_processes", {}).values() if running else ()):
            process.kill()  # cells in hand have left nothing behind
        pool.shutdown(wait=not running, cancel_futures=True)
    return Progress(len(rows), len(cells), failed)


def _unmet(cell: Cell, study: Study, waiting: list[Cell], running: dict[Any, Cell]) -> bool:
    """Whether trainings that a reference or a student needs are still to come."""
    return not set(reference_cells(study, cell)).isdisjoint([*waiting, *running.values()])


def _quiet() -> None:
    import cv2

    cv2.setNumThreads(0)  # each process has one core
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("smp_ensemble").setLevel(logging.ERROR)


def _run(cell: Cell, study: Study, recipe: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """In a process of its own."""
    torch.set_num_threads(max(1, int(os.environ.get("STUDY_THREADS", "1"))))
    key = (study.data, study.mask_column)
    if key not in _loaded:
        _loaded[key] = load_whole(*key)
    return run_cell(cell, study, recipe, _loaded[key], setting)


def described(study: Study) -> dict[str, Any]:
    """The study as params."""
    return {name: str(value) for name, value in asdict(study).items()}
