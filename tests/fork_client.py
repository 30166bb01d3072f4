"""`python -m` for what the commands under test start themselves: the server of tests/forked.py forks the module.

    python fork_client.py ADDRESS -m MODULE ARGUMENTS

It has the client's files, folder and environment. Signals to the client reach it, the end of the client too, and the
client ends as it does. Anything but -m is given to Python itself.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

SIZE = 8  # bytes of a number on the socket


def main() -> None:
    """Ask for the command, and wait for its end."""
    address, *arguments = sys.argv[1:]
    if arguments[:1] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *arguments])
    numbers = [int(path.name) for path in Path("/dev/fd").iterdir()]
    files = [number for number in numbers if number < 3 or (_is_open(number) and os.get_inheritable(number))]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([arguments, str(Path.cwd()), dict(os.environ), files]).encode()
        socket.send_fds(server, [len(request).to_bytes(SIZE)], files)
        server.sendall(request)
        command = _number(server)

        def send_on(number: int, frame: FrameType | None) -> None:
            os.kill(command, number)

        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(each) != signal.SIG_IGN:
                signal.signal(each, send_on)
        code = _number(server)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _number(server: socket.socket) -> int:
    received = server.recv(SIZE, socket.MSG_WAITALL)
    assert len(received) == SIZE, "the server has ended"
    return int.from_bytes(received, signed=True)


def _is_open(number: int) -> bool:
    """The list of open files was one of them."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
