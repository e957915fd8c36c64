"""Prune a small language model in the browser, and compare it with the dense one: a Gradio app.

    python examples/space/app.py                    # http://127.0.0.1:7860
    python examples/space/app.py --models FOLDER    # models of your own, beside those of the Hub

As a Space of the Hub it runs as it is: README.md tells the Hub what it needs. Calibration text is the
English prose that Python itself ships. One pruning runs at a time, and times are of the machine that
the app runs on.
"""

from __future__ import annotations

import argparse

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[], help="folders of causal models")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    args = parser.parse_args()

import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct")
PATTERNS = ("2:4", "4:8", "8:16", "unstructured", "block:4x1")
# How long pruning may take, and what it does then.
EFFORTS = {
    "instant": "the smallest weights go",
    "seconds": "SparseGPT on a little text",
    "minutes": "ALPS, then each block is trained to answer as before",
}
WINDOW, WINDOWS = 256, {"seconds": 16, "minutes": 64}
EXAMPLES = ("What is the capital of France?", "Name three colours.", "Write a line about rain.")
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
table {width: 100%; font-variant-numeric: tabular-nums}
th, td {word-break: normal !important; overflow-wrap: normal !important; padding: 6px !important}
"""


@dataclass
class Choice:
    """A sparse model of a visitor.

    Attributes:
        name: of the dense model.
        folder: where the sparse one is saved.
        compiled: the sparse model, ready to answer.
        megabytes: of its weight file.
        zeros: their share of the weights in the blocks.
    """

    name: str
    folder: Path
    compiled: Any
    megabytes: float
    zeros: float

    def remove(self) -> None:
        """Delete what lies on the disk."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


@lru_cache(maxsize=2)
def dense(name: str) -> tuple[Any, Any, float]:
    """The compiled dense model, its tokenizer, and the megabytes of its weights."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e6
    return hf_sparse.compile(model), AutoTokenizer.from_pretrained(name), size


def prune(
    name: str,
    pattern: str,
    sparsity: float,
    effort: str,
    old: Choice | None,
    progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 # so Gradio wants it
) -> tuple[Choice, str, dict[str, Any], dict[str, Any]]:
    """Prune, save and compile; what is shown, and what can be done from now on."""
    start = time.perf_counter()
    progress(0, desc="Loading the model")
    tokenizer = dense(name)[1]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    implied = pattern[0].isdigit()
    try:
        config = hf_sparse.SparsityConfig(pattern, None if implied else sparsity)
        if effort == "instant":
            report = hf_sparse.prune_(model, config, "magnitude")
        else:
            documents = [topics[topic] for topic in sorted(topics)]
            batches = hf_sparse.calibration_batches(
                tokenizer, documents, num_samples=WINDOWS[effort], window=window_of(model)
            )
            report = hf_sparse.sparsify_(model, config, batches, effort)
    except ValueError as error:  # a pattern that does not fit the model, told in a sentence
        raise gr.Error(str(error)) from error
    folder = Path(tempfile.mkdtemp(prefix="sparse-")) / f"{Path(name).name}-sparse"
    hf_sparse.save_pretrained(model, folder, config, tokenizer=tokenizer, report=report)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    if old is not None:
        old.remove()
    progress(1, desc="Compiling")
    choice = Choice(name, folder, hf_sparse.compile(model), size, report.sparsity)
    archive = shutil.make_archive(str(folder), "zip", folder)
    told = (
        f"**{report.zeros:,} of {report.numel:,} weights in the blocks are zero** "
        f"({report.sparsity:.1%}, {pattern}), after {time.perf_counter() - start:.0f} s."
    )
    ready = gr.update(interactive=True)
    return choice, told, ready, gr.update(value=archive, interactive=True)


def window_of(model: Any) -> int:
    """Tokens in a window of calibration text."""
    return min(WINDOW, getattr(model.config, "max_position_embeddings", WINDOW))


def answer(text: str, length: int, choice: Choice | None) -> tuple[str, str, str]:
    """What both models answer, and a table of sizes and times."""
    if choice is None:
        raise gr.Error("Prune a model first.")
    if not text.strip():
        raise gr.Error("Type a text that the models are to answer.")
    compiled, tokenizer, size = dense(choice.name)
    if tokenizer.chat_template is not None:
        talk = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(
        text, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None
    )
    used = inputs["input_ids"].shape[1]
    room = getattr(compiled.config, "max_position_embeddings", used + length)
    if used + length > room:
        raise gr.Error(f"The text has {used} tokens; the model has room for {room - length}.")
    rows, answers = [], []
    for label, model, megabytes, zeros in (
        ("dense", compiled, size, 0.0),
        ("sparse", choice.compiled, choice.megabytes, choice.zeros),
    ):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)  # what is first needed once
        start = time.perf_counter()
        tokens = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, used:]
        spent = (time.perf_counter() - start) * 1e3 / len(tokens)
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
        rows.append(f"| {label} | {zeros:.1%} | {megabytes:.1f} | {spent:.1f} |")
    head = "| model | zeros in the blocks | weights, MB | ms a token |\n|---|---|---|---|\n"
    threads = torch.get_num_threads()
    note = f"\n\nBoth compiled, threads of this machine: {threads}. The prompt's time counts."
    return answers[0], answers[1], head + "\n".join(rows) + note


def page(models: list[str]) -> gr.Blocks:
    """What is shown."""
    with gr.Blocks(title="hf_sparse", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Make a language model sparse\n"
            "Choose a model and a pattern of zeros, prune it here, and read what it answers beside the "
            "dense model."
        )
        choice = gr.State(None, time_to_live=3600, delete_callback=forget)
        with gr.Row():
            named = [(Path(model).name, model) for model in models]
            name = gr.Dropdown(named, value=models[0], label="Model", min_width=240)
            pattern = gr.Dropdown(
                list(PATTERNS),
                value="2:4",
                label="Pattern",
                info="2:4: two of four weights are zero",
            )
            sparsity = gr.Slider(
                0.1,
                0.9,
                value=0.5,
                step=0.05,
                label="Sparsity",
                info="patterns like 2:4 have their own",
                interactive=False,
                min_width=240,
            )
            effort = gr.Radio(
                [(f"{key}: {told}", key) for key, told in EFFORTS.items()],
                value="seconds",
                label="Effort",
                min_width=240,
            )
        start = gr.Button("Prune", variant="primary")
        told = gr.Markdown("Nothing is pruned yet.", elem_id="told", min_height=60)
        with gr.Row():
            text = gr.Textbox(EXAMPLES[0], label="Text", lines=2, scale=3, min_width=240)
            length = gr.Slider(8, 128, value=32, step=8, label="New tokens", scale=1, min_width=240)
        gr.Examples([[example] for example in EXAMPLES], text)
        ask = gr.Button("Answer", interactive=False)
        with gr.Row():
            of_dense = gr.Textbox(label="Dense", lines=4, min_width=240, elem_id="dense")
            of_sparse = gr.Textbox(label="Sparse", lines=4, min_width=240, elem_id="sparse")
        table = gr.Markdown(elem_id="table")
        folder = gr.DownloadButton("Download the sparse model", interactive=False)
        pattern.change(
            lambda chosen: gr.update(interactive=not chosen[0].isdigit()), pattern, sparsity
        )
        start.click(
            prune,
            [name, pattern, sparsity, effort, choice],
            [choice, told, ask, folder],
            concurrency_id="cpu",
            concurrency_limit=1,
            show_progress_on=told,
        )
        ask.click(
            answer, [text, length, choice], [of_dense, of_sparse, table], concurrency_id="cpu"
        )
    return blocks


def forget(choice: Choice | None) -> None:
    """Delete the model of a visitor who is gone."""
    if choice is not None:
        choice.remove()


if __name__ == "__main__":
    fonts = ["system-ui", "sans-serif"]  # nothing is asked of other servers
    page([*args.models, *MODELS]).queue(max_size=16).launch(
        server_port=args.port,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
