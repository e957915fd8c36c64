"""llama.cpp with one GGUF file, timed on request: run by `llama_cpp_peer.py`, in its own environment.

    python llama_worker.py FILE THREADS     reads "decode N" and "prompt N", answers milliseconds

Decoding is the mean of N tokens behind a prompt of 32, each the likeliest one; a prompt is one call.
"""

import argparse
import sys
import time

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="GGUF")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()

import numpy as np

try:
    from llama_cpp import Llama
except ImportError as error:
    raise SystemExit("llama.cpp is needed: pip install llama-cpp-python") from error

PROMPT = 32


def main(file, threads):
    model = Llama(
        file, n_ctx=512, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )
    ids = np.random.default_rng(0).integers(100, 30000, 512).tolist()

    def decode(tokens):
        model.reset()
        model.eval(ids[:PROMPT])
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        start = time.perf_counter()
        for _ in range(tokens):
            model.eval([token])
            token = int(np.argmax(model.scores[model.n_tokens - 1]))
        return (time.perf_counter() - start) / tokens

    def prompt(tokens):
        model.reset()
        start = time.perf_counter()
        model.eval(ids[:tokens])
        return time.perf_counter() - start

    calls = {"decode": decode, "prompt": prompt}
    for call in calls.values():
        call(16)
    print("ready", flush=True)
    for line in sys.stdin:
        name, number = line.split()
        print(1e3 * calls[name](int(number)), flush=True)


if __name__ == "__main__":
    main(options.file, options.threads)
