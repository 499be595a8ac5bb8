"""A tiny local server that speaks /v1/models and /v1/chat/completions, streams included."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers every chat with ``answer``; keeps the request bodies in ``requests``.

    mode: ``ok``, ``refuse`` (HTTP 400), ``deny`` (401), ``missing`` (404), ``garbage`` (no JSON),
    ``hollow`` (JSON of another shape), ``cut`` (the connection ends in mid-answer), ``stall`` (a
    stream that stops in mid-answer until it closes), ``hang`` (no answer until it closes),
    ``long`` (the answer ends for want of tokens), ``filter`` (a content filter ends it), ``parts``
    (content as a list, without a role), ``loading`` (an error with HTTP 200), ``azure`` (only
    requests with an ``api-version``).

    modes: modes of the next requests, before ``mode`` holds. usage: tokens that replies report.

    ``headers`` and ``paths`` are those of the requests.
    """

    def __init__(self, answer="", mode="ok", models=({"id": "tiny", "max_model_len": 20_000},)):
        self.answer, self.mode, self.models = answer, mode, list(models)
        self.requests, self.props = [], None
        self.headers, self.paths = [], []
        self.modes, self.usage = [], None
        self.closed = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()


def _handler(server):
    return type("Handler", (_Handler,), {"chat": server})


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/props") and self.chat.props:
            self._json(200, self.chat.props)
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": self.chat.models})
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.chat.requests.append(body)
        self.chat.headers.append(dict(self.headers))
        self.chat.paths.append(self.path)
        mode = self.chat.modes.pop(0) if self.chat.modes else self.chat.mode
        match mode:
            case "refuse" | "deny" | "missing" as mode:
                status = {"refuse": 400, "deny": 401, "missing": 404}[mode]
                self._json(status, {"error": {"message": f"no: {mode}"}})
            case "garbage":
                self._send(b"<html>not json</html>")
            case "hang":
                self.chat.closed.wait(20)
            case "hollow":
                self._json(200, {"surprise": True})
            case "loading":
                self._json(200, {"error": {"message": "model is loading", "code": 503}})
            case "azure" if "api-version=" not in self.path:
                self._json(404, {"error": {"message": "no version"}})
            case _ if body.get("stream"):
                self._stream()
            case "cut":
                self._send(b'{"id": "x"', length=5000)
            case _:
                message = {"role": "assistant", "content": self.chat.answer}
                if self.chat.mode == "parts":
                    message = {"content": [{"type": "text", "text": self.chat.answer}]}
                choice = {"index": 0, "message": message, "finish_reason": self._why()}
                usage = {"usage": self.chat.usage} if self.chat.usage else {}
                self._json(200, _reply("chat.completion", choice) | usage)

    def _stream(self):
        cut = self.chat.mode == "cut"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if cut:
            self.send_header("Content-Length", "90000")
        self.end_headers()
        for word in self.chat.answer.split(" "):
            delta = {"role": "assistant", "content": word + " "}
            if self.chat.mode == "parts":
                delta = {"content": [{"type": "text", "text": word + " "}]}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            event = json.dumps(_reply("chat.completion.chunk", choice))
            self.wfile.write(f"data: {event}\n\n".encode())
            if cut:
                return
            if self.chat.mode == "stall":
                self.wfile.flush()
                self.chat.closed.wait(20)
                return
        last = {"index": 0, "delta": {}, "finish_reason": self._why()}
        event = json.dumps(_reply("chat.completion.chunk", last))
        self.wfile.write(f"data: {event}\n\ndata: [DONE]\n\n".encode())

    def _why(self):
        return {"long": "length", "filter": "content_filter"}.get(self.chat.mode, "stop")

    def _json(self, status, value):
        self._send(json.dumps(value).encode(), status)

    def _send(self, body, status=200, length=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)


def _reply(kind, choice):
    return {"id": "x", "object": kind, "created": 1, "model": "tiny", "choices": [choice]}
