# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[runtime,serve]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Serve a compiled sparse language model on this CPU with the API of OpenAI.

    python examples/serve_cpu.py --model FOLDER --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
        -d '{"messages": [{"role": "user", "content": "Name three colours."}], "stream": true}'

`/v1/completions`, `/v1/chat/completions` and `/v1/models` answer as OpenAI's clients expect it, at
once or token by token. `/metrics` gives percentiles of the time until the first token, of the time
between two tokens, and of whole answers; they are printed when the server stops. Answers are made one
after the other, each with all threads: how long a request has waited counts. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal model")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="weights as codes of so many bits")
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (default 8000)")
    parser.add_argument("--threads", type=int, help="threads of an answer (default: torch's)")
    parser.add_argument("--most", type=int, default=512, help="tokens of an answer (default 512)")
    args = parser.parse_args()
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}; wanted 1 or more")
    if args.most < 1:
        parser.error(f"--most is {args.most}; wanted 1 or more")

import json
import queue
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hf_sparse

try:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field
except ImportError as error:
    sys.exit(f"{error}; serving needs fastapi and uvicorn: pip install 'hf_sparse[serve]'")

PERCENTILES = (50, 90, 99)


class RefusedError(Exception):
    """A request that is not answered: the reason, and the status of HTTP."""

    def __init__(self, reason: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.param = status, param


class Request(BaseModel):
    """What both ways to ask have in common; other fields are refused, so that none is ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] = []
    n: Literal[1] = 1
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    user: str | None = None


class CompletionRequest(Request):
    """The body of `/v1/completions`: text, or tokens."""

    prompt: str | list[int]


class Message(BaseModel):
    """One turn of a talk."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(Request):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


@dataclass
class Latencies:
    """How long the last answers took, in milliseconds."""

    first_token: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    next_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))
    answer: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def percentiles(self) -> dict[str, Any]:
        """`{"first_token_ms": {"count": ..., "p50": ...}, ...}`; no percentiles of nothing."""
        told: dict[str, Any] = {}
        for name, values in vars(self).items():
            times = sorted(values)
            places = {p: min(p * len(times) // 100, len(times) - 1) for p in PERCENTILES}
            found = {f"p{p}": round(times[place], 3) for p, place in places.items() if times}
            told[f"{name}_ms"] = {"count": len(times), **found}
        return told


class Abandoned(StoppingCriteria):
    """Ends an answer that nobody reads any more, or that has met a stop word."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set())


class Tokens(BaseStreamer):
    """Hands each new token over to the thread that writes the answer; None ends them."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
        self.prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_is_next:
            self.queue.put(int(value))
        self.prompt_is_next = False

    def end(self) -> None:
        """The worker says when it has ended, with or without an error."""


@dataclass
class Answer:
    """What is known of an answer while it is made."""

    prompt_tokens: int
    tokens: int = 0
    finish_reason: str | None = None

    def usage(self) -> dict[str, int]:
        """The counts of tokens in the words of the API."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens}
        return {**counts, "total_tokens": sum(counts.values())}


class Engine:
    """A compiled model that continues tokens, one request after the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name, self.most = args.model.rstrip("/").rpartition("/")[2], args.most
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
        self.model = hf_sparse.compile(model, bits=args.bits)
        self.context = getattr(model.config, "max_position_embeddings", None)
        self.latencies = Latencies()
        # One thread for all answers: each thread that calls kernels has a pool of threads of its own.
        start = (lambda: torch.set_num_threads(args.threads)) if args.threads else None
        self.worker = ThreadPoolExecutor(1, initializer=start)

    def pieces(self, prompt: list[int], asked: Request, answer: Answer) -> Iterator[str]:
        """The text of an answer, piece by piece; `answer` counts along."""
        start = last = time.perf_counter()
        tokens, over = Tokens(), threading.Event()
        settings = self.settings(len(prompt), asked)
        self.worker.submit(self._generate, prompt, settings, tokens, over, asked.seed)
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        ids: list[int] = []
        told = 0
        try:
            while (token := tokens.queue.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                now = time.perf_counter()
                times = self.latencies.next_tokens if ids else self.latencies.first_token
                times.append((now - last) * 1e3)
                last = now
                ids.append(token)
                answer.tokens = len(ids)
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                if (end := first_of(stops, text)) is not None:
                    answer.finish_reason = "stop"
                    yield text[told:end]
                    return
                if (ready := len(text) - held_back(stops, text)) > told:
                    yield text[told:ready]
                    told = ready
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            ended = settings["max_new_tokens"] > len(ids) or ids[-1] in self._ends()
            answer.finish_reason = "stop" if ended else "length"
            yield text[told:]
        finally:
            over.set()
            self.latencies.answer.append((time.perf_counter() - start) * 1e3)

    def settings(self, length: int, asked: Request) -> dict[str, Any]:
        """What `generate` is asked for; a prompt that has no room is refused."""
        if not length:
            raise RefusedError("The prompt is empty; wanted at least one token.", param="prompt")
        wanted = asked.max_tokens or getattr(asked, "max_completion_tokens", None)
        if wanted is not None and wanted > self.most:
            reason = f"An answer of {wanted} tokens is asked for; this server gives {self.most}"
            raise RefusedError(f"{reason} at most (its flag --most).", param="max_tokens")
        room = self.most if self.context is None else self.context - length
        if room < (wanted or 1):
            raise RefusedError(
                f"The prompt has {length} tokens and the answer {wanted or 'one or more'}; the model "
                f"has room for {self.context}. Shorten the prompt, or ask for a shorter answer."
            )
        sampling = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0}
        chosen = {"do_sample": True, **sampling} if asked.temperature else {"do_sample": False}
        return {"max_new_tokens": wanted or min(room, self.most), **chosen}

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def _generate(
        self,
        prompt: list[int],
        settings: dict[str, Any],
        tokens: Tokens,
        over: threading.Event,
        seed: int | None,
    ) -> None:
        """Run in the worker: what happens there is told through the queue."""
        ended: Exception | None = None
        try:
            if seed is not None:
                torch.manual_seed(seed)
            ids = torch.tensor([prompt])
            given = {"streamer": tokens, "stopping_criteria": [Abandoned(over)], **settings}
            if not over.is_set():
                self.model.generate(ids, attention_mask=torch.ones_like(ids), **given)
        except Exception as error:  # told to the thread that waits for tokens
            ended = error
        tokens.queue.put(ended)

    def encode_chat(self, asked: ChatRequest) -> list[int]:
        """The tokens of a talk, by the tokenizer's own template."""
        if self.tokenizer.chat_template is None:
            raise RefusedError(f"{self.name} has no chat template: ask /v1/completions.")
        talk = [message.model_dump() for message in asked.messages]
        text = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, asked: CompletionRequest) -> list[int]:
        """The tokens of a prompt, checked where they are given as numbers."""
        if isinstance(asked.prompt, str):
            return self.tokenizer(asked.prompt)["input_ids"]
        size = self.model.config.vocab_size
        if wrong := [token for token in asked.prompt if not 0 <= token < size]:
            raise RefusedError(f"Token {wrong[0]} is not one of 0 to {size - 1}.", param="prompt")
        return asked.prompt


def first_of(stops: list[str], text: str) -> int | None:
    """Where the first stop word begins."""
    return min((text.index(stop) for stop in stops if stop and stop in text), default=None)


def held_back(stops: list[str], text: str) -> int:
    """How many characters may yet change, or become a stop word."""
    if text.endswith("\ufffd"):  # a part of a character
        return len(text) - len(text.rstrip("\ufffd"))
    sizes = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(sizes, default=0)


def choice(kind: str, text: str | None, reason: str | None) -> dict[str, Any]:
    """A choice in the form of one of the three kinds of answers."""
    if kind == "text_completion":
        content: dict[str, Any] = {"text": text or ""}
    elif kind == "chat.completion":
        content = {"message": {"role": "assistant", "content": text}}
    else:
        content = {"delta": {"content": text} if text else {}}
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def respond(engine: Engine, asked: Request, prompt: list[int], kind: str) -> Any:
    """The answer to a request, whole or as events."""
    if asked.model not in (None, engine.name):
        raise RefusedError(f"There is no model {asked.model!r}; {engine.name!r} is served.", 404)
    answer = Answer(len(prompt))
    head = {"id": f"hf-sparse-{uuid.uuid4().hex}", "created": int(time.time())}
    head |= {"model": engine.name, "object": kind}
    engine.settings(len(prompt), asked)  # refuse before anything is sent
    pieces = engine.pieces(prompt, asked, answer)
    if not asked.stream:
        text = "".join(pieces)
        return {
            **head,
            "choices": [choice(kind, text, answer.finish_reason)],
            "usage": answer.usage(),
        }
    if kind == "chat.completion":
        kind = head["object"] = "chat.completion.chunk"

    def events() -> Iterator[str]:
        contents = ({"choices": [choice(kind, piece, None)]} for piece in pieces if piece)
        for content in contents:
            yield f"data: {json.dumps({**head, **content})}\n\n"
        last = {"choices": [choice(kind, None, answer.finish_reason)]}
        yield f"data: {json.dumps({**head, **last})}\n\n"
        if asked.stream_options.get("include_usage"):
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.usage()})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def application(engine: Engine) -> FastAPI:
    """The routes, and errors in the form of the API."""
    app = FastAPI(title=f"{engine.name}, sparse and compiled")

    def told(reason: str, status: int, param: str | None = None) -> JSONResponse:
        error = {"message": reason, "type": "invalid_request_error", "param": param, "code": None}
        return JSONResponse({"error": error}, status)

    @app.exception_handler(RefusedError)
    def refuse(_: Any, error: RefusedError) -> JSONResponse:
        return told(str(error), error.status, error.param)

    @app.exception_handler(RequestValidationError)
    def refuse_body(_: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return told(f"{where or 'body'}: {first['msg']}", 400, where or None)

    @app.post("/v1/completions")
    def complete(asked: CompletionRequest) -> Any:
        return respond(engine, asked, engine.encode(asked), "text_completion")

    @app.post("/v1/chat/completions")
    def chat(asked: ChatRequest) -> Any:
        return respond(engine, asked, engine.encode_chat(asked), "chat.completion")

    @app.get("/v1/models")
    def models() -> Any:
        one = {"id": engine.name, "object": "model", "created": 0, "owned_by": "hf_sparse"}
        return {"object": "list", "data": [one]}

    @app.get("/metrics")
    def metrics() -> Any:
        return engine.latencies.percentiles()

    return app


def main(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    engine = Engine(args)
    listening = socket.create_server((args.host, args.port))
    print(f"serving on http://{args.host}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(application(engine), log_level="warning")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # which the server has waited for, and hands on
        print(json.dumps(engine.latencies.percentiles()))


if __name__ == "__main__":
    main(args)
