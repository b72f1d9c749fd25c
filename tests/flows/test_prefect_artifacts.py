"""The link to a run in MLflow's user interface."""

import pytest

from vitprune.orchestration.prefect_artifacts import link
from vitprune.orchestration.tracking.replay import UploadResult


@pytest.mark.parametrize(
    ("uri", "server"),
    [("https://mlflow.example/ui/", "https://mlflow.example/ui"), ("sqlite:///m.db", "http://127.0.0.1:5000")],
)
def test_the_link_opens_the_view_for_model_training(uri: str, server: str) -> None:
    upload = UploadResult(done=1, missed=0, run_id="ab12", experiment_id="3", uri=uri)
    assert link(upload) == f"{server}/#/experiments/3/runs/ab12?workflowType=machine_learning"
