"""Our evaluator for `mlflow.models.evaluate`: the numbers and the page of the command `evaluate`, for a DataFrame.

MLflow imports this module whenever anything is evaluated, so everything heavy is imported when a model of ours comes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import EvaluationArtifact, EvaluationResult, ModelEvaluator

from smp_ensemble.exceptions import ConfigError, InputError
from smp_ensemble.registry import nearest
from smp_ensemble.tracking import names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.models.evaluation import EvaluationDataset
    from mlflow.pyfunc import PyFuncModel

    from smp_ensemble.inference.engine import Engine

NAME = "smp_ensemble"
"""Of the entry point, and so of `evaluators=`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatorConfig:
    """What `evaluator_config` may say.

    Attributes:
        split: What the data is; metrics are named `<split>_iou`, ...
        batch_size: Images at once.
        passes: With dropout on, averaged; 1: dropout is off.
        views: Test-time views such as `d4`; `own`: the model's.
        group: Column with a group for each image: what the intervals of the page draw together.
        name: Column with the names of images; None: `row 0`, `row 1`, ...
        report: Whether the page is made.
    """

    split: str = "test"
    batch_size: int = 8
    passes: int = 1
    views: str = "own"
    group: str | None = None
    name: str | None = None
    report: bool = True

    def __post_init__(self) -> None:
        for name in ("split", "views", "group", "name"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name in {"group", "name"}):
                raise ConfigError(f"expected {name} as text, got {value!r}")
        if not self.split.replace("-", "_").isidentifier():
            raise ConfigError(f"expected split as a word, such as test, got {self.split!r}")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ConfigError(f"expected batch_size as a whole number above 0, got {self.batch_size!r}")
        if not isinstance(self.report, bool):
            raise ConfigError(f"expected report as True or False, got {self.report!r}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EvaluatorConfig:
        """The configuration that MLflow hands over.

        Raises:
            ConfigError: An unknown name, or a value that makes no sense.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown name '{name}' in the evaluator_config of {NAME}: {nearest(name, known)}")
        return cls(**options)


class ReportFile(EvaluationArtifact):
    """A file of the page; its `content` is its bytes."""

    def _save(self, output_artifact_path: str) -> None:
        Path(output_artifact_path).write_bytes(self.content)

    def _load_content_from_file(self, local_artifact_path: str) -> bytes:
        return Path(local_artifact_path).read_bytes()


class SegmentationEvaluator(ModelEvaluator):
    """Measures a model of ours, and its members, on a DataFrame of image bytes and masks.

    Example:
        Found by its name, through the entry-point group `mlflow.model_evaluator`:

            mlflow.models.evaluate(
                "models:/buildings@champion", frame,
                targets="mask", model_type="segmentation", evaluators="smp_ensemble",
            )
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: Mapping[str, Any], **kwargs: Any) -> bool:  # noqa: ARG003
        """Whether the model type is `segmentation`: MLflow asks before it shows the model."""
        return model_type == names.MODEL_TYPE

    def evaluate(
        self,
        *,
        model_type: str,
        dataset: EvaluationDataset,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: PyFuncModel | None = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult | None:
        """Measures, and keeps metrics and page in the run.

        Args:
            model_type: `segmentation`.
            dataset: A DataFrame with a column `image` and a target column; `dataset_of_frame` says what they hold.
            run_id: Where metrics and page go.
            evaluator_config: See `EvaluatorConfig`.
            model: What is measured.
            extra_metrics: None; this evaluator computes its own.
            custom_artifacts: None.
            predictions: None; the model predicts.
            model_id: The logged model; MLflow then logs the metrics that are returned, linked to it.
            kwargs: What later versions of MLflow may add.

        Returns:
            Metrics, and the files of the page by name; None for a model that is not ours, which MLflow takes as
            "somebody else's turn".

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE: data, masks or configuration are not as described, or members
                were trained on these images.
        """
        if not _is_ours(model):
            logger.info("%s evaluates models that smp_ensemble logged, this is none", NAME)
            return None
        assert model is not None
        try:
            for name, value in (
                ("extra_metrics", extra_metrics), ("custom_artifacts", custom_artifacts), ("predictions", predictions),
            ):  # fmt: skip
                if value:
                    raise ConfigError(f"{name}: the evaluator {NAME} takes none, it has its own: leave it out")
            return _evaluate(model, model_id, dataset, run_id, EvaluatorConfig.of(evaluator_config or {}))
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _is_ours(model: Any) -> bool:
    from mlflow.pyfunc import PyFuncModel

    from smp_ensemble.tracking.packing import FLAVOR_NAME

    return isinstance(model, PyFuncModel) and FLAVOR_NAME in (model.metadata.flavors or {})


def _engine_of(model: PyFuncModel, model_id: str | None, config: EvaluatorConfig) -> Engine:
    """The engine inside a loaded model, with the options of this evaluation."""
    from smp_ensemble.ensembling.member import Member

    try:
        engine: Engine = model.get_raw_model()
    except NotImplementedError as error:
        raise ConfigError(
            f"the evaluator {NAME} needs the model in this process, found one behind a server: use env_manager='local'"
        ) from error
    first = engine.ensemble.members[0]
    if len(engine.ensemble.members) == 1 and isinstance(first, Member) and model_id:
        first.source = first.source or f"models:/{model_id}"  # a snapshot does not know its own address
    return engine.with_options(config.passes, config.views)


def _evaluate(
    model: PyFuncModel, model_id: str | None, dataset: EvaluationDataset, run_id: str, config: EvaluatorConfig
) -> EvaluationResult:
    import pandas as pd

    from smp_ensemble.ensembling.member import Member
    from smp_ensemble.evaluation.frames import dataset_of_frame
    from smp_ensemble.evaluation.guards import check_leaks, task_of
    from smp_ensemble.evaluation.measuring import measure_all, member_names
    from smp_ensemble.evaluation.predictions import Predictions
    from smp_ensemble.tracking.pages import REPORT_FOLDER, log_report
    from smp_ensemble.tracking.runs import attach
    from smp_ensemble.typing import DatasetReference

    frame, masks = dataset.features_data, dataset.labels_data
    if not isinstance(frame, pd.DataFrame):
        raise InputError(f"expected data as a DataFrame with columns of images and masks, got {type(frame).__name__}")
    if masks is None:
        raise InputError("expected targets, the column with the masks, got none: pass targets='mask'")
    engine = _engine_of(model, model_id, config)
    data = dataset_of_frame(
        frame, masks, task_of(engine.ensemble), title=dataset.name, name=config.name, group=config.group
    )
    check_leaks([member for member in engine.ensemble.members if isinstance(member, Member)], data, config.split)
    predictions = Predictions(engine, data, batch_size=config.batch_size, label=config.split)
    measurement = measure_all(predictions, split=config.split, names=member_names(engine.ensemble))
    prefix = config.split.replace("-", "_")
    metrics = {f"{prefix}_{name}": value for name, value in measurement.ensemble.score.metrics.items()}
    run = attach(run_id)
    if model_id is None:  # else MLflow logs what is returned, linked to the model
        run.log_metrics(metrics, dataset=DatasetReference(dataset.name, dataset.digest))
    files = []
    if config.report:
        address = f"models:/{model_id}" if model_id else "the model"
        files = log_report(run, measurement, data, engine, title=f"Evaluation of {address}")
    artifacts = {name: ReportFile(f"runs:/{run_id}/{REPORT_FOLDER}/{name}") for name in files}  # type: ignore[no-untyped-call]
    return EvaluationResult(metrics, artifacts, run_id)
