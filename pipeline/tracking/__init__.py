"""MLflow: runs, lineage tags and the model registry. Nothing else imports mlflow."""

import os

# mlflow reads this once, when it is imported; sending usage statistics is for the user to switch on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
