"""Serve a registered model, by default the champion, over HTTP.

    python -m pipeline.serve [--model MODEL] [--host HOST] [--port PORT]

POST /invocations takes {"inputs": images (N, H, W, C)} and answers {"predictions": probabilities (N, classes)}; GET
/health answers 200. Without --host only this machine can reach it.
"""

import argparse

import uvicorn

from pipeline.errors import run_command
from pipeline.tracking import registry, serving, store
from pipeline.tracking.gate import CHAMPION


def main() -> None:
    """Load the model, then answer until interrupted."""
    arguments = _arguments()
    store.connect()
    version = registry.find(arguments.model)
    application = serving.application(version, arguments.host)
    print(f"{version.name} version {version.version} is served at http://{arguments.host}:{arguments.port}", flush=True)
    uvicorn.run(application, host=arguments.host, port=arguments.port, log_level="warning")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.serve", description="Serve a registered model over HTTP.")
    parser.add_argument(
        "--model", default=CHAMPION, help="an alias, a version, NAME@alias or NAME/version (default: champion)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=5002, help="the port to listen at (default: %(default)s)")
    return parser.parse_args()


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; allowed: 1 to 65535")
    return int(text)


if __name__ == "__main__":
    run_command(main)
