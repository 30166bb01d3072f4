"""Check the packages in requirements.lock for known vulnerabilities in the OSV database.

Runs pip-audit, and adds what it lacks: an accepted vulnerability must have a reason, and an unreachable database is
reported in one line. With ``--if-reachable`` that is not a failure, for machines without a network.
"""

import argparse
import json
import subprocess
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = ROOT / ".ci/vulnerabilities-accepted.txt"
OSV = "https://api.osv.dev/v1/query"


def main() -> None:
    """Exit code 0: no known vulnerability. 1: there is one, or the database could not be reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--if-reachable", action="store_true", help="exit with 0 if OSV cannot be reached")
    parser.add_argument("--osv-url", default=OSV)
    parser.add_argument("--exceptions", type=Path, default=EXCEPTIONS)
    arguments = parser.parse_args()
    accepted = read_exceptions(arguments.exceptions)
    if reason := out_of_reach(arguments.osv_url):
        print(f"requirements.lock was NOT audited: {arguments.osv_url} cannot be reached: {reason}", file=sys.stderr)
        sys.exit(not arguments.if_reachable)
    # Nothing is installed for it: the lock file names every package, its version and its hashes.
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--strict"]
    command += ["--progress-spinner", "off", "--requirement", str(ROOT / "requirements.lock")]
    command += ["--vulnerability-service", "osv", "--osv-url", arguments.osv_url]
    for name, reason in accepted.items():
        print(f"accepted: {name}: {reason}")
        command += ["--ignore-vuln", name]
    sys.exit(subprocess.run(command, check=False).returncode)


def out_of_reach(address: str) -> str:
    """Why OSV cannot be reached, on one line; empty if it can.

    OSV speaks JSON and rejects an empty query with 400. A proxy or a network's login page returns something else in its
    place.
    """
    try:
        status, body = answer(address)
    except (OSError, HTTPException) as error:
        return " ".join(f"{error}".split())
    return "" if status in (200, 400) and is_json(body) else f"the server there, with HTTP {status}, is not OSV"


def answer(address: str) -> tuple[int, bytes]:
    """Status and body of the response to an empty query."""
    try:
        with urlopen(Request(address, data=b"{}"), timeout=10) as given:
            return given.status, given.read()
    except HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read()


def is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def read_exceptions(path: Path) -> dict[str, str]:
    """The reason why each vulnerability is accepted, by its name in OSV."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    accepted = {name: reason.strip() for name, _, reason in (line.strip().partition(" ") for line in lines)}
    for name, reason in accepted.items():
        if not reason:
            sys.exit(f"{path}: {name} is accepted without a reason: write one after it")
    return accepted


if __name__ == "__main__":
    main()
