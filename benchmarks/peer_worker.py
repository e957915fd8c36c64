"""One runtime with one model, timed on request: run by `peers.py`, in the runtime's own environment.

    python peer_worker.py KIND MODEL        reads "BATCH TOKENS" lines, answers milliseconds of a call

A new shape is called a few times first, and each timed call follows one that is not, which brings
the weights back to where they are in a process that does nothing else. MODEL is a folder, an ONNX
file or a compiled module; `torch` kinds and `ours` take a transformers folder.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time

THREADS = 2
WARM_UP = 3


def inputs(batch, tokens):
    import numpy as np

    ids = np.random.default_rng(0).integers(1000, 30000, (batch, tokens))
    return ids.astype(np.int64), np.ones((batch, tokens), np.int64)


def torch_model(folder, dtype="float32", compiled=False, ours=False):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    if ours:
        import hf_sparse
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model_class = getattr(transformers, name.removeprefix("Sparse"), transformers.AutoModel)
    model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    run = torch.compile(model) if compiled else model
    if ours:
        run = hf_sparse.compile(model, target=os.environ.get("HF_SPARSE_TARGET"))
        del model  # the dense weights are no longer needed

    def prepare(batch, tokens):
        ids, mask = (torch.from_numpy(array) for array in inputs(batch, tokens))

        def call():
            with torch.inference_mode():
                run(input_ids=ids, attention_mask=mask)

        return call

    return prepare


def onnxruntime_model(file):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Threads that spin after a call would slow down whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def prepare(batch, tokens):
        ids, mask = inputs(batch, tokens)
        every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
        feed = {given.name: every[given.name] for given in session.get_inputs()}
        return lambda: session.run(None, feed)

    return prepare


def openvino_model(file):
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": THREADS}

    def prepare(batch, tokens):
        model = core.read_model(file)
        model.reshape({"input_ids": [batch, tokens], "attention_mask": [batch, tokens]})
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        feed = list(inputs(batch, tokens))
        return lambda: request.infer(feed)

    return prepare


def deepsparse_model(file):
    from deepsparse import Engine

    def prepare(batch, tokens):
        # The engine rewrites the file's input shapes: it gets a copy.
        with tempfile.TemporaryDirectory() as folder:
            copied = shutil.copy(file, folder)
            shapes = [[batch, tokens], [batch, tokens]]
            engine = Engine(copied, batch_size=batch, num_cores=THREADS, input_shapes=shapes)
        feed = list(inputs(batch, tokens))
        return lambda: engine.run(feed)

    return prepare


def tensorflow_model(_):
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", KERAS_BACKEND="tensorflow")
    import keras_hub
    import tensorflow

    tensorflow.config.threading.set_intra_op_parallelism_threads(THREADS)
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    blocks = {"num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}
    model = keras_hub.models.BertBackbone(
        vocabulary_size=30522, max_sequence_length=512, dropout=0.0, **blocks
    )
    run = tensorflow.function(lambda feed: model(feed, training=False))

    def prepare(batch, tokens):
        ids, mask = (
            tensorflow.constant(array, tensorflow.int32) for array in inputs(batch, tokens)
        )
        feed = {"token_ids": ids, "padding_mask": mask, "segment_ids": tensorflow.zeros_like(ids)}
        return lambda: run(feed)["sequence_output"].numpy()

    return prepare


def iree_model(file):
    import iree.runtime
    import numpy as np

    context = iree.runtime.SystemContext(config=iree.runtime.Config("local-task"))
    context.add_vm_module(iree.runtime.VmModule.mmap(context.instance, file))
    main = context.modules.module["main_graph"]

    def prepare(batch, tokens):
        feed = inputs(batch, tokens)
        return lambda: np.asarray(main(*feed).to_host())

    return prepare


KINDS = {
    "torch": torch_model,
    "torch-bf16": lambda folder: torch_model(folder, "bfloat16"),
    "torch-compile": lambda folder: torch_model(folder, compiled=True),
    "torch-compile-bf16": lambda folder: torch_model(folder, "bfloat16", compiled=True),
    "ours": lambda folder: torch_model(folder, ours=True),
    "onnxruntime": onnxruntime_model,
    "onnxruntime-int8": onnxruntime_model,
    "openvino": openvino_model,
    "deepsparse": deepsparse_model,
    "tensorflow": tensorflow_model,
    "iree": iree_model,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what runtimes print goes to stderr
    prepare = KINDS[options.kind](options.model)
    print("ready", file=answers)
    calls = {}
    for line in sys.stdin:
        shape = tuple(map(int, line.split()))
        if shape not in calls:
            calls = {shape: prepare(*shape)}  # one shape at a time is kept
            for _ in range(WARM_UP):
                calls[shape]()
        calls[shape]()
        start = time.perf_counter()
        calls[shape]()
        print((time.perf_counter() - start) * 1e3, file=answers)


if __name__ == "__main__":
    main()
