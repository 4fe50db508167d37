"""Whether a training is new, goes on, or is finished already: what `resume` says, and what is there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.exceptions import ConfigError, DivergedError, InputError, UndeliveredError
from smp_ensemble.tracking.finished import configuration_of, find_by_token, find_finished
from smp_ensemble.tracking.outages import insist
from smp_ensemble.workflows.options import DistillOptions, MainOptions, TrainOptions
from smp_ensemble.workflows.states import Identity, TrainingState, held, matching, new_state, of_run, unfinished

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from smp_ensemble.data.forms import DataSplits

AUTO = "auto"
_CHANGES_NOTHING = {"workers", "resume"}

logger = logging.getLogger(__name__)


def identity_of(
    kind: str,
    options: TrainOptions,
    splits: DataSplits,
    parent_run_id: str | None = None,
    taught: Mapping[str, Any] | None = None,
) -> Identity:
    """All that determines the result of a training, or of a plan: options, the images themselves, and a teacher."""
    known = {one.name for one in fields(options if isinstance(options, DistillOptions) else TrainOptions)}
    wanted = known - _CHANGES_NOTHING
    values = {name: json.dumps(value, sort_keys=True) for name, value in asdict(options).items() if name in wanted}
    values |= {name: str(value) for name, value in (taught or {}).items()}
    for part in ("train", "val", "left_out"):
        data = getattr(splits, part)
        if data is not None:
            values[f"images of {part.replace('_', '-')}"] = data.digest
    return Identity(kind, values, parent_run_id)


@contextlib.contextmanager
def begun(
    identity: Identity, resume: str, *, experiment: str | None, params: Mapping[str, str]
) -> Iterator[TrainingState | str]:
    """The state of a training that begins, or goes on, in the block; or the run of one that is finished already.

    With an error of the user's the state goes unless something was trained, with all others it stays.

    Args:
        identity: What is to be trained.
        resume: `auto`, a run, or nothing.
        experiment: Where to look for finished ones.
        params: As the run has them, to say in what another one differs.

    Raises:
        ConfigError: The named run is of another training, or cannot be gone on with from here.
    """
    found = _named(identity, resume, params) if resume not in {"", AUTO} else None
    if resume == AUTO:
        found = matching(identity) or insist(
            lambda _: find_finished(
                identity.kind, identity.digest, experiment=experiment, parent_run_id=identity.parent_run_id
            )
        )
        if found is None:
            logger.info("resume=auto: no %s of this configuration was begun here: it begins now", identity.kind)
    if isinstance(found, str):
        logger.info("this %s is finished already: run %s", identity.kind, found)
        yield found
        return
    if found is None:
        _hint(identity)
    state = found or new_state(identity, versions())
    with held(state):
        if state.is_continued:
            state = _with_run(state, experiment)
            _compare_versions(state)
        try:
            yield state
        except InputError:
            if state.folder.exists() and state.checkpoint is None and not any(state.spool.glob("*/*-*")):
                state.discard()
            raise


def _named(identity: Identity, run_id: str, params: Mapping[str, str]) -> TrainingState | str:
    """The training of a run that was named, if it is the one that the options describe."""
    state = of_run(identity.kind, run_id)
    if state is not None:
        different = identity.difference(state.identity.values)
        if different is not None:
            _refuse(run_id, *different)
        return state
    finished_with, found = configuration_of(run_id)
    if finished_with == identity.digest:
        return run_id
    for name, value in params.items():
        if name in found and found[name] != value:
            _refuse(run_id, name, found[name], value)
    begun_here = ", ".join(str(one.run_id) for one in unfinished(identity.kind)) or "none"
    raise ConfigError(
        f"resume={run_id}: nothing of that {identity.kind} is kept in this folder; what was begun here and is not "
        f"finished: {begun_here}. Go on where it was begun, or train anew"
    )


def _refuse(run_id: str, name: str, there: str, here: str) -> None:
    name = name.replace("_", "-")
    raise ConfigError(
        f"resume={run_id}: that run was begun with {name}={there}, now it is {name}={here}: go on with the same "
        "options, or train anew without resume"
    )


def _with_run(state: TrainingState, experiment: str | None) -> TrainingState:
    """A process may have died between opening a run and writing down which."""
    if state.run_id is not None:
        return state
    parent = state.identity.parent_run_id
    run_id = insist(lambda _: find_by_token(state.token, experiment=experiment, parent_run_id=parent))
    return state if run_id is None else state.with_run(run_id)


def _hint(identity: Identity) -> None:
    left = matching(identity)
    if left is not None:
        logger.info(
            "a %s of this very configuration was begun and is not finished (run %s): --resume auto would go on with it",
            identity.kind,
            left.run_id,
        )


def versions() -> dict[str, str]:
    """What results may depend on in their last bits."""
    packages = ("smp-ensemble", "torch", "lightning", "timm", "segmentation-models-pytorch")
    return {**{name: version(name) for name in packages}, "threads": str(torch.get_num_threads())}


def _compare_versions(state: TrainingState) -> None:
    now = versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in state.versions.items() if now.get(name, old) != old]
    if changed:
        logger.warning(
            "the training began with other versions, so it may end with other last bits: %s", ", ".join(changed)
        )


@contextlib.contextmanager
def telling(options: TrainOptions) -> Iterator[None]:
    """Adds to an error that ends the block how to go on, where going on may help."""
    try:
        yield
    except (InputError, DivergedError):
        raise
    except UndeliveredError as error:
        several = options.seeds or (options.fold is None and (options.folds or options.bootstrap))
        if several or isinstance(options, MainOptions):  # there is more to do than to deliver
            error.add_note(resume_note(options))
        raise
    except BaseException as error:
        error.add_note(resume_note(options))
        raise


def resume_note(options: TrainOptions) -> str:
    """How to go on with the training that these options describe: the command, as one types it."""
    if os.environ.get("MLFLOW_RUN_ID"):
        return "the same `mlflow run` with -P resume=auto goes on with it"
    commands = {MainOptions: "main", DistillOptions: "distill"}
    words = ["smp-ensemble", commands.get(type(options), "train")]
    for known in fields(options):
        value = getattr(options, known.name)
        default = known.default_factory() if known.default_factory is not MISSING else known.default
        if value != default and known.name != "resume":
            words += [f"--{known.name.replace('_', '-')}", _typed(value)]
    return f"to go on: {shlex.join([*words, '--resume', AUTO])}"


def _typed(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
