"""A parent of a gateway process that other processes can kill or suspend; prints its port, then what it reports.

A grandchild inherits the pipe to the gateway and holds it open.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from quantserve.serve.driver import gateway_process
from quantserve.serve.driver.gateway_process import GatewayProcess
from quantserve.serve.gateway.middleware.limits import Policy

if __name__ == "__main__":
    gateway_process.HANGS_S = 3.0  # type: ignore[misc]
    listener = socket.create_server(("127.0.0.1", 0))
    settings = {"models": [], "token": "t", "policy": Policy().model_dump(mode="json")}
    gateway = GatewayProcess(listener, settings, lambda line: print(line, flush=True))
    assert gateway._process.stdin is not None
    held = os.dup(gateway._process.stdin.fileno())
    subprocess.Popen(["sleep", sys.argv[1]], pass_fds=[held])
    print(listener.getsockname()[1], gateway._process.pid, flush=True)
    while True:
        time.sleep(1)
