"""The command `snapshots`: on one data set, which `--dataset` names where there are several."""

from __future__ import annotations

from mlflow.entities import Dataset, DatasetInput, Metric

from smp_ensemble.tracking import names


def write(client, digest, iou):
    run_id = client.create_run("0", tags={names.KIND: names.SNAPSHOT}).info.run_id
    tags = {names.KIND: names.SNAPSHOT}
    model_id = client.create_logged_model("0", name="one", source_run_id=run_id, tags=tags).model_id
    client.log_inputs(run_id, [DatasetInput(Dataset("roofs/val", digest, "local", "x"))])
    client.log_batch(run_id, metrics=[Metric("val_iou", iou, 1, 1, model_id, "roofs/val", digest, run_id)])
    client.finalize_logged_model(model_id, "READY")
    client.set_tag(run_id, names.MODEL_ID, model_id)
    return model_id


def test_scores_on_several_data_sets_ask_for_one(command, tracking, capsys):
    write(tracking, "aaaa1111", 0.9)
    other = write(tracking, "bbbb2222", 0.1)
    code, _, errors = command("snapshots")
    assert code == 2
    assert "aaaa1111 (1 snapshots); roofs/val bbbb2222 (1 snapshots). Say which: --dataset DIGEST" in errors[0]
    code, values, _ = command("snapshots", "--dataset", "bb")
    assert code == 0
    assert [(row["snapshot"], row["val_iou"]) for row in values["snapshots"]] == [(other, 0.1)]
    code, _, errors = command("snapshots", "--dataset", "cc")
    assert code == 2
    assert "no snapshot was scored on data 'cc'; there is: roofs/val aaaa1111" in errors[0]
