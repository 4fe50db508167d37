"""What may pass is tried again, soon and within bounds; what somebody set in the environment holds."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, REQUEST_LIMIT_EXCEEDED

from smp_ensemble.tracking.outages import is_passing


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionError("refused"), True),
        (TimeoutError(), True),
        (MlflowException("down"), True),
        (MlflowException("busy", error_code=REQUEST_LIMIT_EXCEEDED), True),
        (MlflowException("changed param", error_code=INVALID_PARAMETER_VALUE), False),
        (FileNotFoundError("gone"), False),
        (KeyError("defect"), False),
    ],
)
def test_what_may_pass_is_tried_again_and_a_refusal_is_not(error, passing):
    assert is_passing(error) is passing
