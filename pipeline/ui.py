"""Show the tracking store in MLflow's pages, for this machine only.

python -m pipeline.ui [--port PORT]
"""

import os
import sys

from pipeline import command_line, http_server
from pipeline.errors import UserError, run_command
from pipeline.tracking import addresses, store

HOST = "127.0.0.1"
ALLOWED_HOSTS = "localhost:*,127.0.0.1:*"  # without it MLflow answers pages of other sites that rebind their name
# A page for one person needs one process: four of them take twice as long to start, and say "running" before they are.
WORKERS = "1"


def main() -> None:
    """Update the store as every command does, and become MLflow's server."""
    port = command_line.parse("ui").port
    uri = addresses.configured()
    if uri.startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI names a server, which has these pages itself: open {uri}")
    store.connect()
    with http_server.listen(HOST, port):
        pass  # the port is free: MLflow would find out only after ten seconds
    settings = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which all who use this machine could read
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONWARNINGS": "ignore",  # what MLflow's libraries tell its developers
    }
    options = ["--host", HOST, "--port", str(port), "--allowed-hosts", ALLOWED_HOSTS, "--workers", WORKERS]
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options], os.environ | settings)


if __name__ == "__main__":
    run_command(main)
