"""Between snapshots and MLflow: the only package that imports mlflow."""
