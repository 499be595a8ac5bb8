"""A small OpenAI-compatible embeddings server, for tests."""

import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

DIM = 8


def vector_of(text: str) -> list[float]:
    """The stand-in model: any text, or any prompt with an image, to a vector of length 3."""
    seed = zlib.crc32(text.encode())
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (3 * vector / np.linalg.norm(vector)).tolist()


class Server:
    """An OpenAI-compatible embeddings server whose next answers can be scripted."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.script: list = []  # of functions (handler, body) in place of an answer
        self.delay = 0.0
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append({"path": self.path, **body})
                    server.headers.append(dict(self.headers))
                    server.busy += 1
                    server.most_busy = max(server.most_busy, server.busy)
                    act = server.script.pop(0) if server.script else None
                time.sleep(server.delay)
                with server.lock:
                    server.busy -= 1  # a client that has its answer may ask again at once
                if act is not None:
                    act(self, body)
                else:
                    answer(self, 200, {"data": rows(body)})

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def rows(body: dict) -> list[dict]:
    texts = body.get("input") or [json.dumps(body["messages"])]
    return [{"index": i, "embedding": vector_of(text)} for i, text in enumerate(texts)]


def answer(handler, status: int, content, **headers) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(raw)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def answering(status: int, content, **headers):
    return lambda handler, _: answer(handler, status, content, **headers)
