"""Files of compiled models that somebody changed: an error, or a model that reads its own memory."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

import hf_sparse
from hf_sparse.checkpoint import compiled as compiled_files
from hf_sparse.checkpoint import skeleton
from hf_sparse.formats import FormatError
from tests.guarded_memory import guard_the_runtime
from tests.test_compile import random_model

DECODER = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    # Weights for single tokens as bits and as matrices, biases, and 50 neurons: no whole groups.
    "gpt2": lambda: random_model(
        GPT2Config(n_embd=32, n_inner=50, n_layer=2, n_head=4, n_positions=64, **DECODER)
    ),
    # Four chunks of rows, gates, and two-byte weights.
    "llama": lambda: random_model(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=2400,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **DECODER,
        ),
        0.9,
    ).bfloat16(),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Tensors]]:
    """Descriptions and tensors of compiled models."""
    found = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        hf_sparse.save_compiled(hf_sparse.compile(make()), folder)
        described = json.loads((folder / "compiled.json").read_text())
        found[name] = (described, load_file(folder / "compiled.safetensors"))
    return found


def write(folder: Path, described: Any, tensors: Tensors, described_too: bool = True) -> Path:
    """A compiled model of these; `described_too`: the description tells the tensors' sizes."""
    folder.mkdir(exist_ok=True)
    if described_too:
        described["types"] = {n: [str(t.dtype), list(t.shape)] for n, t in tensors.items()}
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "compiled.safetensors")
    (folder / "compiled.json").write_text(json.dumps(described))
    return folder


Changed = Callable[[Callable[[dict[str, Any], Tensors], None]], Path]


@pytest.fixture
def changed(saved: dict, tmp_path: Path, request: pytest.FixtureRequest) -> Changed:
    """Writes the compiled model that `request.param` names, changed by a function."""

    def make(change: Callable[[dict[str, Any], Tensors], None]) -> Path:
        described, tensors = saved[request.param]
        described, tensors = copy.deepcopy(described), {n: t.clone() for n, t in tensors.items()}
        change(described, tensors)
        return write(tmp_path / "changed", described, tensors)

    return make


@pytest.mark.parametrize("changed", MODELS, indirect=True)
def test_what_is_not_changed_loads(changed: Changed) -> None:
    hf_sparse.load_compiled(changed(lambda described, tensors: None))


GPT2, LLAMA = "stack.blocks.0.", "stack.blocks.1."
STACK: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], object], str]] = {}


def case(name: str, model: str, message: str) -> Callable:
    def add(change: Callable[[dict[str, Any], Tensors], object]) -> None:
        STACK[name] = (model, change, message)

    return add


@case("offsets that wrap around", "llama", "chunks go back")
def _(described: dict, t: Tensors) -> None:
    chunks = t[f"{LLAMA}up.0.chunks"]
    assert len(chunks) == 5
    last = int(chunks[4, 3] - chunks[3, 3])
    chunks[:, 3] = torch.tensor([0, 2**62, -(2**62) - 1, -(1 << 40), last])


@case("offsets beyond the stream", "llama", "are cut off")
def _(described: dict, t: Tensors) -> None:
    t[f"{LLAMA}up.0.chunks"][1:, 3] += 2**62


@case("counts whose product wraps around", "llama", "more nonzeros than columns")
def _(described: dict, t: Tensors) -> None:
    t[f"{LLAMA}up.0.groups"][0, 2] = 2**31 - 1


@case("a short bias", "gpt2", "bias has 50 numbers, not 52")
def _(described: dict, t: Tensors) -> None:
    t[f"{GPT2}up.bias"] = t[f"{GPT2}up.bias"][:50]


@case("no bias and no word of it", "llama", "its weight for single tokens is missing")
def _(described: dict, t: Tensors) -> None:
    for name in ("words", "single_values", "starts"):
        t.pop(f"{LLAMA}down.{name}")


@case("a short norm", "gpt2", "norms")
def _(described: dict, t: Tensors) -> None:
    t[f"{GPT2}norms.0.weight"] = t[f"{GPT2}norms.0.weight"][:31]


@case("a repeated row", "llama", "in a panel twice")
def _(described: dict, t: Tensors) -> None:
    order = t[f"{LLAMA}out.0.order"]
    order[0] = order[2]


@case("a row that is left out", "llama", "never begun|out of range")
def _(described: dict, t: Tensors) -> None:
    order = t[f"{LLAMA}out.0.order"]
    order[order == 5] = 7


@case("a panel of the next columns", "llama", "a panel begins")
def _(described: dict, t: Tensors) -> None:
    t[f"{LLAMA}down.0.panels"][0, 0] = 1


@case("bits beyond the last column", "gpt2", "stand for no row or no column")
def _(described: dict, t: Tensors) -> None:
    words = t[f"{GPT2}down.words"].view(torch.int64)
    assert words.shape == (8, 4)  # 50 columns: the last word has 2
    words[0, 3] ^= 1 << 7


@case("bits beyond the last row", "gpt2", "stand for no row or no column")
def _(described: dict, t: Tensors) -> None:
    words = t[f"{GPT2}up.words"].view(torch.int64)
    assert words.shape == (13, 2)  # 50 rows: the last group has 2
    words[12, 0] ^= 1 << 40


@case("a bit more than values", "gpt2", "starts do not match the bits")
def _(described: dict, t: Tensors) -> None:
    words = t[f"{GPT2}qkv.words"].view(torch.int64)
    words[0, 0] ^= 1


@case("more values than bits", "gpt2", "values are cut off")
def _(described: dict, t: Tensors) -> None:
    values = t[f"{GPT2}qkv.single_values"]
    t[f"{GPT2}qkv.single_values"] = torch.cat([values, values])


@case("no tensor elements", "gpt2", "cut off")
def _(described: dict, t: Tensors) -> None:
    t[f"{GPT2}qkv.0.indices"] = t[f"{GPT2}qkv.0.indices"][:0]


@case("offsets of another type", "gpt2", "chunks are int32")
def _(described: dict, t: Tensors) -> None:
    t[f"{GPT2}qkv.0.chunks"] = t[f"{GPT2}qkv.0.chunks"].int()


@case("signed columns", "gpt2", "indices are int8")
def _(described: dict, t: Tensors) -> None:
    t[f"{GPT2}qkv.0.indices"] = t[f"{GPT2}qkv.0.indices"].view(torch.int8)


@case("a tensor too many", "gpt2", "which it does not need")
def _(described: dict, t: Tensors) -> None:
    t[f"{GPT2}qkv.dense_too"] = torch.zeros(3)


@case("a layer in two parts", "gpt2", "is cut into 2 parts")
def _(described: dict, t: Tensors) -> None:
    up = described["blocks"][0]["linears"]["up"]
    (numbers,) = up["parts"]
    up["parts"], up["edges"] = [numbers, copy.deepcopy(numbers)], [0, 32, 64]
    for name in [n for n in t if n.startswith(f"{GPT2}up.0.")]:
        t[name.replace("up.0.", f"up.{len(numbers)}.")] = t[name]


def numbers(described: dict, linear: str = "up") -> dict[str, Any]:
    found: dict[str, Any] = described["blocks"][0]["linears"][linear]["parts"][0][0]
    return found


@case("rows without end", "gpt2", "for 68719476736 rows")
def _(described: dict, t: Tensors) -> None:
    numbers(described)["rows"] = 1 << 36


@case("columns that are no number", "gpt2", "its sizes are")
def _(described: dict, t: Tensors) -> None:
    numbers(described)["columns"] = 32.0


@case("rows that are no blocks", "gpt2", "sizes|rows")
def _(described: dict, t: Tensors) -> None:
    numbers(described)["rows"] = 51


@case("neurons without end", "gpt2", "100000000 neurons, and 50")
def _(described: dict, t: Tensors) -> None:
    described["stack"]["intermediate"] = 100_000_000


@case("zeros without end", "gpt2", "zeros of")
def _(described: dict, t: Tensors) -> None:
    described["blocks"][0]["linears"]["up"]["zeros"] = 10**30


@case("a name that is none", "gpt2", "is called 7")
def _(described: dict, t: Tensors) -> None:
    described["blocks"][0]["linears"]["up"]["name"] = 7


@case("negative heads", "gpt2", "heads|a size")
def _(described: dict, t: Tensors) -> None:
    described["stack"]["heads"] = described["stack"]["key_heads"] = -4


@case("more than there should be", "gpt2", "its description")
def _(described: dict, t: Tensors) -> None:
    described["blocks"][0]["linears"]["up"]["more"] = 1


@case("words that nobody embeds", "llama", "weights do not fit")
def _(described: dict, t: Tensors) -> None:
    described["config"]["vocab_size"] = 12_000_000_000


@case("blocks without end", "gpt2", "there are 2 blocks")
def _(described: dict, t: Tensors) -> None:
    described["config"]["n_layer"] = 10**29


@case("blocks without end by another name", "gpt2", "there are 2 blocks")
def _(described: dict, t: Tensors) -> None:
    described["config"]["num_hidden_layers"] = 10**29


@case("labels without end", "gpt2", "num_labels")
def _(described: dict, t: Tensors) -> None:
    described["config"].update(id2label=None, label2id=None, num_labels=10**10)


@case("a family that is not compiled", "gpt2", "family 't5'")
def _(described: dict, t: Tensors) -> None:
    described["config"].update(model_type="t5", num_layers=10**29)


@case("tied to nothing", "gpt2", "nowhere")
def _(described: dict, t: Tensors) -> None:
    described["tied"]["lm_head.weight"] = "nowhere"


@case("tied and stored", "gpt2", "stored, and tied")
def _(described: dict, t: Tensors) -> None:
    described["tied"]["transformer.ln_f.weight"] = "transformer.ln_f.bias"


@case("another save's description", "gpt2", "not saved together")
def _(described: dict, t: Tensors) -> None:
    described["id"] = "0" * 32


@case("no id", "gpt2", "not saved together")
def _(described: dict, t: Tensors) -> None:
    t.pop("id")


@pytest.mark.parametrize(
    ("changed", "name"), [(STACK[name][0], name) for name in STACK], indirect=["changed"]
)
def test_what_was_changed_is_found(changed: Changed, name: str) -> None:
    _, change, message = STACK[name]
    folder = changed(lambda described, tensors: change(described, tensors) and None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=message):
        hf_sparse.load_compiled(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("end", [".down.bias", ".words", ".norms.0.bias", "wte.weight", "id"])
def test_tensors_that_are_missing_are_found(saved: dict, tmp_path: Path, end: str) -> None:
    described, tensors = saved["gpt2"]
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}
    assert len(kept) < len(tensors)
    folder = write(tmp_path / "missing", copy.deepcopy(described), kept, described_too=False)
    with pytest.raises(FormatError, match="is missing|not saved together"):
        hf_sparse.load_compiled(folder)


def test_a_description_beside_the_weights_of_another_save_is_found(
    saved: dict, tmp_path: Path
) -> None:
    """What a kill between two renames leaves: even two saves of one model are not mixed."""
    model = hf_sparse.compile(MODELS["gpt2"]())
    old, new = (hf_sparse.save_compiled(model, tmp_path / name) for name in ("old", "new"))
    shutil.copy(new / "compiled.json", old / "compiled.json")
    with pytest.raises(FormatError, match="not saved together"):
        hf_sparse.load_compiled(old)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a few tokens, and of one more behind them."""
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], dim=1)


def in_a_child(run: Callable[[], None]) -> int:
    """Run something in a process of its own; its exit status, negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("how", ["cut", "overwritten", "removed"])
def test_what_happens_to_the_file_afterwards_changes_nothing(
    saved: dict, tmp_path: Path, how: str
) -> None:
    folder = write(tmp_path / "served", *copy.deepcopy(saved["gpt2"]))
    file = folder / "compiled.safetensors"
    wanted, model = logits(hf_sparse.load_compiled(folder)), hf_sparse.load_compiled(folder)

    def run() -> None:
        if how == "cut":
            os.truncate(file, 1000)
        elif how == "overwritten":
            with file.open("r+b") as opened:  # the same file, not a new one of its name
                opened.write(b"\x7f" * file.stat().st_size)
        else:
            file.unlink()
        torch.testing.assert_close(logits(model), wanted)

    assert in_a_child(run) == 0


def test_a_file_that_is_cut_off_while_it_is_read_is_found(
    saved: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "cut", *copy.deepcopy(saved["gpt2"]))
    real = compiled_files.read_header

    def read_and_cut(file: Any) -> Any:
        found = real(file)
        os.truncate(folder / "compiled.safetensors", file.tell() + 100)
        return found

    monkeypatch.setattr(compiled_files, "read_header", read_and_cut)
    with pytest.raises(FormatError, match="cut off while it was read"):
        hf_sparse.load_compiled(folder)


HEADERS: dict[str, Any] = {
    "no table": [],
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "overlapping": {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    },
    "a gap": {"a": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]}},
    "too short": {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}},
    "too long": {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}},
    "negative": {"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}},
    "two negatives": {"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}},
    "wrapping": {"a": {"dtype": "U8", "shape": [2**33, 2**33, 4], "data_offsets": [0, 4]}},
    "texts": {"a": {"dtype": "U8", "shape": ["4"], "data_offsets": ["0", "4"]}},
    "floats": {"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0.0, 4.0]}},
    "a type of none": {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    "a type that is a list": {"a": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_found(saved: dict, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "lies", *copy.deepcopy(saved["gpt2"]))
    header = json.dumps(HEADERS[name]).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "compiled.safetensors").write_bytes(content)
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(folder)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**6, 0])
def test_headers_of_any_length_are_found(saved: dict, tmp_path: Path, length: int) -> None:
    folder = write(tmp_path / "long", *copy.deepcopy(saved["gpt2"]))
    (folder / "compiled.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(100))
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(folder)


TEXTS = {
    "nested": "[" * 100_000,
    "a nested config": '{"layout": LAYOUT, "id": "", "config": ' + "[" * 100_000,
    "a long number": '{"layout": ' + "9" * 10_000 + "}",
    "no text": "\udc80",
    "a list": "[1]",
    "another layout": '{"layout": [3]}',
    "nothing else": '{"layout": LAYOUT}',
    "an id that is none": '{"layout": LAYOUT, "id": [1], "types": {}}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_descriptions_of_any_kind_are_found(saved: dict, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "texts", *copy.deepcopy(saved["gpt2"]))
    text = TEXTS[name].replace("LAYOUT", json.dumps(compiled_files.LAYOUT))
    (folder / "compiled.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError):
        hf_sparse.load_compiled(folder)


def test_a_config_does_not_choose_code_to_download(
    saved: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, tensors = copy.deepcopy(saved["llama"])
    described["config"].update(attn_implementation="someone/kernel", _attn_implementation="x/y")
    built = []
    real = skeleton._with_one_block

    def watched(config: Any) -> Any:
        built.append(config._attn_implementation)
        return real(config)

    monkeypatch.setattr(skeleton, "_with_one_block", watched)
    hf_sparse.load_compiled(write(tmp_path / "code", described, tensors))
    assert built == ["eager"]


def test_a_folder_without_a_compiled_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        hf_sparse.load_compiled(tmp_path / "none")
    with pytest.raises(FormatError, match="it holds nothing"):
        hf_sparse.load_compiled(tmp_path)
    (tmp_path / "graph.onnx").touch()
    with pytest.raises(FormatError, match=r"it holds graph.onnx.*save_compiled"):
        hf_sparse.load_compiled(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FormatError, match=r"checkpoint, which from_pretrained loads"):
        hf_sparse.load_compiled(tmp_path)
    os.mkfifo(tmp_path / "compiled.json")  # not waited for
    with pytest.raises(FormatError, match="missing"):
        hf_sparse.load_compiled(tmp_path)


def test_a_full_disk_is_an_os_error_and_the_old_model_stays(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does."""
    model = hf_sparse.compile(MODELS["gpt2"]())
    hf_sparse.save_compiled(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for most in (30_000, 60_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            with pytest.raises(OSError, match="cannot be written"):
                hf_sparse.save_compiled(model, tmp_path)

    assert in_a_child(run) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    """Two blocks have one dense weight; a norm's weight and bias lie in one piece."""
    model = random_model(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **DECODER), 0.0)
    first, second = model.transformer.h
    second.attn.c_proj.weight = first.attn.c_proj.weight
    both = torch.randn(64)
    model.transformer.ln_f.weight.data, model.transformer.ln_f.bias.data = both[:32], both[32:]
    compiled = hf_sparse.compile(model)
    loaded = hf_sparse.load_compiled(hf_sparse.save_compiled(compiled, tmp_path))
    torch.testing.assert_close(logits(loaded), logits(compiled))
    again = hf_sparse.load_compiled(hf_sparse.save_compiled(loaded, tmp_path / "again"))
    torch.testing.assert_close(logits(again), logits(compiled))


# What numbers, texts and lists of a description are replaced by.
VALUES: list[Any] = [0, -1, 1, 3, 2**31, 2**31 - 1, 2**32, 2**62, 2**63, -(2**62), 10**30, 0.5, 1e300]
VALUES += [float("nan"), float("inf"), True, None, "", "x", "torch.int8", [], {}, [0], [[]], {"a": 1}]


def change_description(described: Any, chance: random.Random) -> str:
    """Change one thing in a description; tells what."""
    path: list[Any] = []
    owner: Any = described
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not path:
            keys = ["stack", "blocks", "order", "config", "class", "tied", "types", "generation"]
        path.append(chance.choice(keys))
        inner = owner[path[-1]]
        if not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.1:
            break
        owner = inner
    key, old = path[-1], owner[path[-1]]
    if chance.random() < 0.2:
        del owner[key]
    elif type(old) is int and chance.random() < 0.6:
        owner[key] = old + chance.choice([-1, 1, 4, -4, 16, 64])
    elif isinstance(old, list) and old and chance.random() < 0.5:
        old.append(old[0]) if chance.random() < 0.5 else chance.shuffle(old)
    else:
        owner[key] = copy.deepcopy(chance.choice(VALUES))
    return f"{path}: {str(old)[:40]}"


def change_tensor(tensors: Tensors, chance: random.Random) -> str:
    """Change one tensor, most often one that kernels follow; tells which, and how."""
    names = [name for name in sorted(tensors) if name != "id"]
    followed = [name for name in names if name.startswith("stack.")]
    name = chance.choice(followed if chance.random() < 0.9 else names)
    tensor = tensors[name]
    flat = tensor.view(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    how = chance.choice(["set", "add", "swap", "roll", "cut", "grow", "type", "take", "bit", "drop"])
    if not flat.numel():
        return name
    one, other = (chance.randrange(len(flat)) for _ in range(2))
    numbers = flat.view(bits)
    if how == "set":
        size = 8 * tensor.itemsize
        numbers[one] = chance.choice([0, 1, 255 if size == 8 else -1, 2 ** (size - 2), len(flat)]) % (
            256 if size == 8 else 2 ** (size - 1)
        )
    elif how == "add":
        numbers[one] += chance.choice([1, -1, 2, -2, 4, 16])
    elif how == "bit":
        numbers[one] ^= 1 << chance.randrange(7)
    elif how == "swap":
        numbers[one], numbers[other] = numbers[other].clone(), numbers[one].clone()
    elif how == "roll":
        numbers.copy_(numbers.roll(chance.choice([1, -1, 3])))
    elif how == "cut":
        tensors[name] = tensor[: chance.randrange(len(tensor))] if tensor.ndim else tensor
    elif how == "grow":
        tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor
    elif how == "type":
        tensors[name] = tensor.view(bits)
    elif how == "take":
        tensors[name] = tensors[chance.choice(followed)].clone()
    else:
        del tensors[name]
    return f"{name}: {how} at {one}"


def attack(saved: dict, folder: Path, seed: int, count: int) -> Counter[str]:
    """Load and run changed files, whose memory ends at pages without access; tells what came of it."""
    found: Counter[str] = Counter()
    chance = random.Random(seed)
    for _ in range(count):
        described, tensors = saved[chance.choice(sorted(saved))]
        described, tensors = copy.deepcopy(described), {n: t.clone() for n, t in tensors.items()}
        in_description = chance.random() < 0.4
        if in_description:
            told = change_description(described, chance)
        else:
            told = change_tensor(tensors, chance)
        (folder / "told").write_text(told)
        write(folder / "model", described, tensors, described_too=not in_description)
        try:
            model = hf_sparse.load_compiled(folder / "model")
        except FormatError:
            found["refused"] += 1
            continue
        try:
            logits(model)
            found["ran"] += 1
        except Exception as error:
            found[f"{told}: {error!r}"] += 1
    return found


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 300), pytest.param(1, 5000, marks=pytest.mark.slow)]
)
def test_random_changes_are_found_or_harmless(
    saved: dict, tmp_path: Path, seed: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        guard_the_runtime(monkeypatch)
        found = attack(saved, tmp_path, seed, count)
        (tmp_path / "found").write_text(json.dumps(found))

    status = in_a_child(run)
    assert status == 0, (tmp_path / "told").read_text()
    found = json.loads((tmp_path / "found").read_text())
    print(found)
    assert found.pop("refused") > 0.5 * count
    assert found.pop("ran") > 0.05 * count
    assert not found
