"""Serve a registered model, by default the champion, over HTTP.

    python -m pipeline.serve [--model MODEL] [--host HOST] [--port PORT]

POST /invocations takes {"inputs": images (N, H, W, C)} and answers {"predictions": probabilities (N, classes),
"unlike_training": whether each does not look like the training images}. It also takes a picture as the body, or several
as a form, and answers as `predict --json` does. GET /health answers 200. Without --host only this machine can reach it.
"""

from pipeline import command_line, http_server
from pipeline.errors import run_command
from pipeline.tracking import registry, serving, store


def main() -> None:
    """Load the model, then answer until interrupted."""
    arguments = command_line.parse("serve")
    store.connect()
    version = registry.find(arguments.model)
    with http_server.listen(arguments.host, arguments.port) as listening:
        application = serving.application(version, arguments.host)
        address = f"http://{arguments.host}:{arguments.port}"
        print(f"{version.name} version {version.version} is served at {address}", flush=True)
        http_server.run(application, listening)


if __name__ == "__main__":
    run_command(main)
