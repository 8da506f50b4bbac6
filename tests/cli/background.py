"""A process that stands for `quantserve serve`: it has a record, answers /health and /status, and drains.

python -m cli.background [--detach LOG] [--fail CODE] [--drain SECONDS] [--in-part] [--state STATE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from quantserve.serve.driver.announce import say
from quantserve.serve.driver.detach import detach
from quantserve.system.servers import Record


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detach")
    parser.add_argument("--fail", type=int)
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--drain", type=float, default=0.0)
    parser.add_argument("--in-part", action="store_true")
    parser.add_argument("--state", default="ready")
    options = parser.parse_args()
    background = detach(options.detach) if options.detach else None
    if isinstance(background, int):
        return background
    stopped = threading.Event()
    at_once = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: (at_once if stopped.is_set() else stopped).set())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = {"models": [{"id": "m", "state": options.state}]}
            body = json.dumps(ready if self.path == "/status" else {"status": "ok"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say("starting")
    if options.fail is not None:
        print("error: no weights", file=sys.stderr)
        return int(options.fail)
    record = Record(
        os.environ,
        url=f"http://127.0.0.1:{server.server_address[1]}",
        drain_s=1.0,
        sources=("app.yaml",),
        models=("m",),
        log=background.log if background else "",
    )
    while options.hang and not stopped.wait(0.1):
        pass
    if not stopped.is_set():
        say(background.stop_line if background else "Press Ctrl-C to stop.")
        record.update(state="ready")
        if background:
            background.ready(not options.in_part)
        stopped.wait()
    record.update(state="stopping")
    at_once.wait(options.drain)
    record.remove()
    say("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
