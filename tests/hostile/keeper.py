"""Process 1 of an arena: run a grader within a time limit, then write down what it leaves behind.

As process 1 of its own process namespace it outlives every attempt to kill all processes. It uses nothing
but the standard library, so that nothing a submission changes is imported here.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PORT = 47999  # a server that a submission may try to send something to
received: list[bytes] = []


def listen() -> None:
    """Collect what anybody sends to this machine's loopback."""
    server = socket.create_server(("127.0.0.1", PORT))
    while True:
        connection, _ = server.accept()
        received.append(connection.recv(1000))
        connection.close()


def processes() -> dict[int, str]:
    """Return the commands of all processes that live, but for this one."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if int(folder.name) != os.getpid() and state not in "ZX":
            found[int(folder.name)] = command[:200]
    return found


def run(command: list[str], seconds: float) -> dict[str, object]:
    """Run one command and return its exit code (None: out of time), its time and the end of what it wrote."""
    start = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
    ) as process:
        written = bytearray()

        def read() -> None:
            assert process.stdout is not None
            while part := os.read(process.stdout.fileno(), 1 << 16):
                written.extend(part)
                del written[:-20_000]

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(1)  # a process that was left behind may keep the pipe open
        text = bytes(written).decode(errors="replace")
        result = {"code": code, "seconds": time.monotonic() - start, "written": text}
        if reader.is_alive():
            process.stdout = None  # closing it would wait for the reader
        return result


def main() -> None:
    """Read the commands and the limit from the arguments, write a report in JSON to the descriptor given."""
    descriptor, seconds, commands = int(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)):  # the loopback is up
        threading.Thread(target=listen, daemon=True).start()
    end = time.monotonic() + seconds
    runs = [run(command, max(1.0, end - time.monotonic())) for command in commands]
    time.sleep(0.5)
    left = processes()
    if left:
        time.sleep(4)  # long enough for what they mean to do
    shared = [path.name for path in Path("/dev/shm").iterdir()]
    report = {"runs": runs, "left": list(processes().values()), "received": len(received), "shared": shared}
    with os.fdopen(descriptor, "w") as out:
        json.dump(report, out)


main()
