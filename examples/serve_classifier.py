# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[runtime]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Answer requests with a compiled sparse model, over HTTP on this machine, and report latencies.

    python examples/serve_classifier.py --model FOLDER --port 8000
    curl -d '{"text": "a gripping film"}' http://127.0.0.1:8000
    python examples/serve_classifier.py --smoke     # a tiny model, 50 requests of its own, then stops

A POST with `{"text": ...}` gets the label and the scores of a sequence classification model. GET
gives the latency percentiles of the requests so far. The standard library's server takes each
request in a thread of its own; the compiled model may be called from all of them.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub name of a sequence classification model")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (default 8000)")
    parser.add_argument("--threads", type=int, help="threads of one answer (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="tiny model, 50 requests, then stop")
    args = parser.parse_args()
    if not args.smoke and not args.model:
        parser.error("wanted --model, or --smoke")

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_sparse

PERCENTILES = (50, 90, 99)
LONGEST = 1 << 20


class Service:
    """A compiled classifier and the time that its answers took."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = hf_sparse.compile(model), tokenizer
        self.milliseconds: deque[float] = deque(maxlen=10_000)

    def answer(self, text: str) -> dict[str, Any]:
        """Classify one text."""
        start = time.perf_counter()
        limit = self.model.config.max_position_embeddings
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)
        with torch.inference_mode():
            scores = self.model(**inputs).logits[0].softmax(-1)
        self.milliseconds.append((time.perf_counter() - start) * 1e3)
        label = self.model.config.id2label[int(scores.argmax())]
        return {"label": label, "scores": [round(float(score), 4) for score in scores]}

    def percentiles(self) -> dict[str, float]:
        """Latencies of the last requests, in milliseconds."""
        times = sorted(self.milliseconds)
        if not times:
            return {}
        places = {p: min(int(p / 100 * len(times)), len(times) - 1) for p in PERCENTILES}
        return {f"p{p}": round(times[place], 2) for p, place in places.items()}


def handler(service: Service) -> type[BaseHTTPRequestHandler]:
    """The requests that the server takes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {"requests": len(service.milliseconds), **service.percentiles()})

        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length", 0))
                if not 0 < size <= LONGEST:
                    raise ValueError(f"a body of {size} bytes; wanted 1 to {LONGEST}")
                request = json.loads(self.rfile.read(size))
                if not isinstance(request, dict) or not isinstance(request.get("text"), str):
                    raise ValueError('wanted {"text": "..."}')
            except ValueError as error:
                self._reply(400, {"error": str(error)})
                return
            self._reply(200, service.answer(request["text"]))

        def _reply(self, code: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Keep the terminal quiet."""

    return Handler


def smoke_model() -> tuple[Any, Any]:
    """A tiny random classifier, pruned, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "a", "film", "good", "bad"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]"
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    model = BertForSequenceClassification(config).eval()
    hf_sparse.prune_(model, hf_sparse.SparsityConfig("block:4x1", 0.8), "magnitude")
    return model, tokenizer


def main(args: argparse.Namespace) -> None:
    """Serve until interrupted, or for the smoke requests."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.smoke:
        model, tokenizer = smoke_model()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    service = Service(model, tokenizer)
    server = ThreadingHTTPServer(("127.0.0.1", 0 if args.smoke else args.port), handler(service))
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"serving on {address}", flush=True)
    if not args.smoke:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(json.dumps(service.percentiles()))
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for number in range(50):
        body = json.dumps({"text": "a good film " * (1 + number % 7)}).encode()
        with urllib.request.urlopen(urllib.request.Request(address, body)) as reply:
            answer = json.loads(reply.read())
    with urllib.request.urlopen(address) as reply:
        print(json.dumps({"last": answer, **json.loads(reply.read())}))
    server.shutdown()


if __name__ == "__main__":
    main(args)
