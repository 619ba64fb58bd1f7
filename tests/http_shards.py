"""A web server on loopback that serves a folder, and fails as told."""

import collections
import contextlib
import http.server
import threading
from pathlib import Path

STALLED = 30.0  # seconds at most that a stalled answer holds its thread; less where the test ends before


class Server(http.server.ThreadingHTTPServer):
    """faults[name] is what becomes of its next answers: "500", "404", "stall", "cut", "corrupt", "short" or "slow";
    then, or if it is a string, for ever. requests counts answers begun, by file name."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults = root, {}
        self.requests, self.done = collections.Counter(), threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that has gone is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        with server.lock:
            server.requests[name] += 1
            waiting = server.faults.get(name, [])
            fault = waiting if isinstance(waiting, str) else waiting.pop(0) if waiting else ""
        path = server.root / name
        if fault in ("500", "404") or not path.is_file():
            self.send_error(int(fault or 404))
            return
        if fault.startswith(("ftp:", "file:", "http:")):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        raw = bytearray(path.read_bytes())
        if fault == "corrupt":
            raw[len(raw) // 2] ^= 1
        if fault == "short":  # and its Content-Length says that this is all
            raw = raw[: len(raw) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[: len(raw) // 2] if fault in ("stall", "cut", "slow") else raw)
        if fault in ("stall", "slow"):
            self.wfile.flush()
            server.done.wait(STALLED if fault == "stall" else 0.05)
        if fault == "slow":
            self.wfile.write(raw[len(raw) // 2 :])


@contextlib.contextmanager
def serving(root: Path):
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.done.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
