"""A small HTTP server that answers as a Ray dashboard does, with a token or without."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

TOKEN = "0123456789abcdef"


@dataclass
class Dashboard:
    """What it answers, and what it was asked."""

    token: str | None = None
    ray_version: str = "2.60.0"
    jobs: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    version_body: bytes | None = None
    address: str = ""
    asked: list[str] = field(default_factory=list)
    tokens_sent: list[str | None] = field(default_factory=list)

    def answer(self, method: str, path: str, authorization: str | None) -> tuple[int, bytes]:
        self.asked.append(f"{method} {path}")
        self.tokens_sent.append(authorization)
        if self.token is not None and authorization is None:
            return 401, b"Unauthorized: Missing authentication token"
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 403, b"Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, self.version_body or json.dumps({"ray_version": self.ray_version}).encode()
        if path == "/api/jobs/":
            return 200, json.dumps(self.jobs).encode()
        if path.startswith("/api/v0/logs/file?"):
            query = parse_qs(path.partition("?")[2])
            known = query["node_id"] == ["n1"] and query["filename"][0] in self.files
            return (200, self.files[query["filename"][0]].encode()) if known else (500, b"A file is not found")
        name, _, verb = path.removeprefix("/api/jobs/").partition("/")
        for job in self.jobs:
            if job["submission_id"] == name and verb != "logs/tail":
                if verb == "stop":
                    job["status"] = "STOPPED"
                body = {"": job, "logs": {"logs": self.logs.get(name, "")}, "stop": {"stopped": True}}[verb]
                return 200, json.dumps(body).encode()
        return 404, b"there is no such thing"


def job(name: str, status: str, **further: Any) -> dict[str, Any]:
    """A job as the Jobs API writes it, submitted by this program."""
    metadata = {"rlhf_ray": "0.1.0", "run_dir": f"/runs/{name}", "pipeline": "tiny.yaml"}
    return {"submission_id": name, "status": status, "metadata": metadata, "message": "", **further}


@contextmanager
def serving(dashboard: Dashboard) -> Iterator[Dashboard]:
    """The dashboard on a port of this machine; its address is filled in."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            status, body = dashboard.answer(self.command, self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = reply  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            """Nothing of it goes to standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    dashboard.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield dashboard
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
