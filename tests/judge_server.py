"""A chat server that judges: log-probabilities, grades under a schema, or grades in words."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    """Gives each prompt the relevance that ``relevance(text)`` says, in [0, 1].

    able: what it can do, of ``logprobs``, ``schema``, ``words``; asked for log-probabilities
    that it has not, it refuses (``strict``) or leaves them out.
    fail: called with the prompt's text; a status to answer with, ``hang``, ``garbage`` (no JSON),
    ``hollow`` (JSON of another shape), ``blank`` (a choice without a message), ``cut`` (the
    connection ends in mid-answer), or None.
    """

    def __init__(self, relevance, able=("logprobs", "schema", "words"), strict=False, fail=None):
        self.relevance, self.able, self.strict = relevance, able, strict
        self.fail = fail or (lambda text: None)
        self.requests, self.answer = [], None
        self.under_way = self.most = 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def reply(self, body):
        """Status and JSON."""
        text = text_of(body)
        if "response_format" in body and "schema" not in self.able:
            return 400, {"error": {"message": "response_format is not supported"}}
        if body.get("logprobs") and "logprobs" not in self.able and self.strict:
            return 400, {"error": {"message": "logprobs is not supported"}}
        score = self.relevance(text)
        choice = {"index": 0, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["message"] = {"role": "assistant", "content": "True"}
            if "logprobs" in self.able:
                choice["logprobs"] = {"content": [first_token(score)]}
        else:
            grade = json.dumps({"grade": round(score * 10)})
            said = self.answer or (grade if "response_format" in body else f"Sure: {grade}.")
            choice["message"] = {"role": "assistant", "content": said}
        fixed = {"id": "x", "object": "chat.completion", "created": 1, "model": "judge"}
        return 200, {**fixed, "choices": [choice]}


def first_token(score):
    shares = {"True": score * 0.6, " true": score * 0.3, "False": (1 - score) * 0.9, "So": 0.05}
    top = [
        {"token": token, "logprob": math.log(share), "bytes": None}
        for token, share in shares.items()
        if share > 0
    ]
    return {"token": "True", "logprob": 0.0, "bytes": None, "top_logprobs": top}


def text_of(body):
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "<picture>") for part in content)


def _handler(server):
    return type("Handler", (_Handler,), {"judge": server})


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.requests.append(body)
            judge.under_way += 1
            judge.most = max(judge.most, judge.under_way)
        try:
            time.sleep(0.02)
            failure = judge.fail(text_of(body))
            if failure == "hang":
                judge.released.wait(10)
            if isinstance(failure, int):
                status, value = failure, {"error": {"message": "no"}}
            else:
                status, value = judge.reply(body)
        finally:
            with judge.lock:
                judge.under_way -= 1
        value = {"hollow": {"surprise": True}, "blank": {"choices": [{}]}}.get(failure, value)
        data = json.dumps(value).encode()
        if failure == "garbage":
            data = b"<html>not json</html>"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) + 5000 * (failure == "cut")))
        self.end_headers()
        self.wfile.write(data)
