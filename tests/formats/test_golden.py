"""The bytes of the format: golden files, a reader written from docs/format.md, its examples."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from hf_sparse.configuration_sparse import CONFIG_VERSION, SparsityConfig
from hf_sparse.formats import FORMATS, compress, decompress, join
from hf_sparse.patterns import NM, Pattern
from hf_sparse.quantization import Grid, rounded
from tests.golden.make_golden import (
    CODED_FILES,
    CODED_WEIGHT,
    FOLDER,
    NAME,
    PATTERNS,
    WEIGHT,
    coded_bytes,
    coded_parts,
    golden_bytes,
    golden_parts,
)

SPECIFICATION = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
CODED = [name for name in FORMATS if name not in ("auto", "dense")]


def read_by_the_specification(data: bytes, name: str) -> list[list[float]]:
    """The fp32 weight `name` of a safetensors file, read as docs/format.md says and without us."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])

    def tensor(key: str, code: str) -> list[float]:
        start, end = header[key]["data_offsets"]
        return [value for (value,) in struct.iter_unpack(code, data[8 + length :][start:end])]

    (form,) = [form for form in CODED if f"{name}.{form}" in header] or ["dense"]
    bits = next((bits for bits in (8, 4) if f"{name}.scales{bits}" in header), None)
    rows, columns, transposed, *parameters = tensor(f"{name}.layout", "<q")
    positions = tensor(f"{name}.{form}", "<B") if form != "dense" else []
    if bits is None:
        assert header[name]["dtype"] == "F32"
        values = iter(tensor(name, "<f"))
    else:
        assert header[name]["dtype"] == "U8"
        values = iter(numbers_of(tensor(name, "<B"), bits))
    weights = [0.0] * (rows * columns)
    if bits is not None:
        weights = [0] * (rows * columns)
    if form == "dense":
        weights = [next(values) for _ in weights]
    elif form == "bitmask":
        for index in range(len(weights)):
            if positions[index // 8] >> index % 8 & 1:
                weights[index] = next(values)
    elif form in ("gap4", "gap8"):
        skip = 15 if form == "gap4" else 255
        codes = positions
        if form == "gap4":
            codes = [half for byte in positions for half in (byte & 15, byte >> 4)]
        position = 0
        for code in codes:
            position += code
            if code != skip:
                weights[position] = next(values)
                position += 1
    elif form == "rice":
        low, count = parameters
        flags = [byte >> i & 1 for byte in positions for i in range(8)]
        remainders = flags[: count * low]
        quotients = iter(flags[-(-count * low // 8) * 8 :])
        position = 0
        for i in range(count):
            gap = sum(bit << j for j, bit in enumerate(remainders[i * low : (i + 1) * low]))
            while not next(quotients):
                gap += 2**low
            weights[position + gap] = next(values)
            position += gap + 1
    elif form == "nm":
        n, m = parameters
        masks = [mask for mask in range(2**m) if mask.bit_count() == n]
        size, per_word = word_of(len(masks))
        for group in range(len(weights) // m):
            start = group // per_word * size
            word = int.from_bytes(bytes(positions[start : start + size]), "little")
            mask = masks[word // len(masks) ** (group % per_word) % len(masks)]
            for j in range(m):
                if mask >> j & 1:
                    weights[group * m + j] = next(values)
    else:
        height, width = parameters
        across = columns // width
        for block in range(len(weights) // (height * width)):
            if positions[block // 8] >> block % 8 & 1:
                for i in range(height * width):
                    row = block // across * height + i // width
                    weights[row * columns + block % across * width + i % width] = next(values)
    assert not next(values, 0)  # half a byte may fill up
    assert next(values, None) is None
    if bits is not None:
        scales = [
            struct.unpack("<f", struct.pack("<HH", 0, half))[0]
            for half in tensor(f"{name}.scales{bits}", "<H")
        ]
        zero_points = [2 ** (bits - 1)] * len(scales)
        if f"{name}.zero_points" in header:
            zero_points = numbers_of(tensor(f"{name}.zero_points", "<B"), bits)
        size = rows * columns // len(scales)
        for index, stored in enumerate(weights):
            zero_point = zero_points[index // size]
            code = (stored + zero_point) % 2**bits - zero_point
            weights[index] = code * scales[index // size]
    matrix = [weights[row * columns : (row + 1) * columns] for row in range(rows)]
    return [list(column) for column in zip(*matrix, strict=True)] if transposed else matrix


def numbers_of(stored: list[int], width: int) -> list[int]:
    """Numbers of 8 or 4 bits in bytes, the low half first."""
    return stored if width == 8 else [half for byte in stored for half in (byte & 15, byte >> 4)]


def word_of(sets: int) -> tuple[int, int]:
    """Bytes of a word and ranks in it, by the rule of docs/format.md."""
    best = (math.inf, 0, 0)
    for size in (1, 2, 4, 8):
        ranks = 0
        while sets ** (ranks + 1) <= 2 ** (8 * size):
            ranks += 1
        if ranks:
            best = min(best, (size / ranks, size, ranks))
    return best[1:]


def hexed(tensor):
    return bytes(tensor.tolist()).hex(" ")


def examples(section):
    """The lines of the worked examples below a heading, as (name, text) pairs."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", SPECIFICATION, re.M | re.S)
    blocks = re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)
    return [[tuple(line.split(None, 1)) for line in block.splitlines()] for block in blocks]


def test_there_is_a_golden_file_for_every_format():
    assert list(PATTERNS) == CODED
    assert sorted(path.stem for path in FOLDER.glob("*.safetensors")) == sorted(CODED)


@pytest.mark.parametrize("name", CODED)
def test_today_gives_the_bytes_of_the_golden_file(name):
    assert golden_bytes(name) == (FOLDER / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("name", CODED)
def test_a_golden_file_gives_the_literal_weight(name):
    stored = load((FOLDER / f"{name}.safetensors").read_bytes())
    assert stored.keys() == {join(NAME, part) for part in ("", name, "layout")}
    weight = decompress({part: stored[join(NAME, part)] for part in ("", name, "layout")})
    assert torch.equal(weight.view(torch.int32), WEIGHT.view(torch.int32))


@pytest.mark.parametrize("name", CODED)
def test_a_reader_written_from_the_specification_reads_the_golden_file(name):
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    assert read_by_the_specification(data, NAME) == WEIGHT.tolist()


def test_there_is_a_golden_file_for_every_coding():
    stems = sorted(path.stem for path in (FOLDER / "codes").glob("*.safetensors"))
    assert stems == sorted(CODED_FILES)
    assert {form for form, _ in CODED_FILES.values()} == {"dense", *CODED}
    kinds = {(grid.bits, grid.symmetric) for _, grid in CODED_FILES.values()}
    assert kinds == {(8, True), (8, False), (4, True), (4, False)}


@pytest.mark.parametrize("name", CODED_FILES)
def test_today_gives_the_bytes_of_the_golden_file_of_few_bits(name):
    data = (FOLDER / "codes" / f"{name}.safetensors").read_bytes()
    assert coded_bytes(name) == data
    assert read_by_the_specification(data, NAME) == CODED_WEIGHT.tolist()
    stored = load(data)
    parts = {key.removeprefix(NAME).removeprefix("."): stored[key] for key in stored}
    assert torch.equal(decompress(parts), CODED_WEIGHT)


@pytest.mark.few(2)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("name", "notation"),
    [(name, "unstructured") for name in ("dense", "bitmask", "gap4", "gap8", "rice")]
    + [("nm", "2:4"), ("block", "block:3x2")],
)
def test_a_reader_written_from_the_specification_reads_codes(name, notation, transposed, symmetric):
    pattern = Pattern.parse(notation)
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).add_(0.3)
    weight *= pattern.keep(weight.abs(), 0.5)
    for grid in (Grid(8, 32, symmetric), Grid(4, 64, symmetric), Grid(4, None, symmetric)):
        exact = rounded(weight, grid)
        stored = exact.T.contiguous() if transposed else exact
        parts = compress(stored, name, pattern, transposed=transposed, grid=grid)
        data = save({join("a.weight", part): tensor for part, tensor in parts.items()})
        assert read_by_the_specification(data, "a.weight") == stored.tolist()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("name", "notation"),
    [(name, "unstructured") for name in ("bitmask", "gap4", "gap8", "rice")]
    + [("nm", notation) for notation in ("1:2", "1:4", "2:4", "1:8", "4:8", "1:16", "8:16")]
    + [("block", notation) for notation in ("block:3x2", "block:1x16", "row", "column", "head:6")],
)
def test_a_reader_written_from_the_specification_reads_every_format(name, notation, transposed):
    pattern = Pattern.parse(notation)
    weight = torch.randn(12, 80, generator=torch.Generator().manual_seed(0))
    weight *= pattern.keep(weight.abs(), 0.5)
    weight *= torch.arange(80) % 80 < 40
    weight[5:] = 0.0
    weight[-1, 0] = 1.0
    stored = weight.T.contiguous() if transposed else weight
    parts = compress(
        stored, name, pattern if name in ("nm", "block") else None, transposed=transposed
    )
    data = save({join("a.weight", part): tensor for part, tensor in parts.items()})
    assert read_by_the_specification(data, "a.weight") == stored.tolist()


@pytest.mark.parametrize("name", CODED)
def test_the_first_example_of_the_specification(name):
    section = "`gap4` and `gap8`" if name.startswith("gap") else f"`{name}`"
    documented = dict(examples(section)[0])
    parts = golden_parts(name)
    assert documented[name] == hexed(parts[name])
    assert documented["layout"].split() == [str(number) for number in parts["layout"].tolist()]
    assert [float(value) for value in documented["values"].split()] == parts[""].tolist()


def test_the_examples_of_coded_values():
    weight, *shown = examples("Coded values")
    rows = [[float(value) for value in " ".join(line).split()] for line in weight]
    assert rows == CODED_WEIGHT.tolist()
    files = ["bitmask-scales4", "bitmask-scales4-zero_points", "nm-scales8"]
    for name, documented in zip(files, map(dict, shown), strict=True):
        parts = coded_parts(name)
        parts["values"] = parts.pop("")
        assert parts.keys() == documented.keys()
        assert documented.pop("layout").split() == list(map(str, parts.pop("layout").tolist()))
        for part, text in documented.items():
            assert text == hexed(parts[part].view(torch.uint8).reshape(-1)), part


def test_the_weight_of_the_specification_is_the_golden_one():
    ((first, *rest),) = ([" ".join(line).split() for line in block] for block in examples("Values"))
    assert [[float(value) for value in row] for row in [first, *rest]] == WEIGHT.tolist()


def test_the_second_gap_example_of_the_specification():
    weight = torch.zeros(1, 1000)
    weight[0, [2, 257, 600, 856]] = 1.0
    assert dict(examples("`gap4` and `gap8`")[1])["gap8"] == hexed(compress(weight, "gap8")["gap8"])


def test_the_second_nm_example_of_the_specification():
    masks = [0xF0, 0x0F, 0x17, 0x81, 0x55]
    weight = torch.tensor([[float(mask >> j & 1) for j in range(8)] for mask in masks])
    word = 69 + 0 * 70 + 1 * 70**2 + 35 * 70**3 + 20 * 70**4
    coded = hexed(compress(weight, "nm", NM(4, 8))["nm"])
    assert dict(examples("`nm`")[1])["nm"] == coded == word.to_bytes(4, "little").hex(" ")
    assert f"69 + 0 * 70 + 1 * 70^2 + 35 * 70^3 + 20 * 70^4 = {word}`" in SPECIFICATION


def test_the_words_of_the_first_nm_example():
    words = golden_parts("nm")["nm"].tolist()
    assert words == [4 + 0 * 6 + 0 * 36, 0 + 0 * 6 + 2 * 36, 1 + 3 * 6]
    assert all(f"= {word}`" in SPECIFICATION for word in words)


def test_the_rank_table_of_the_specification():
    masks = [mask for mask in range(16) if mask.bit_count() == 2]
    for rank, mask in enumerate(masks):
        positions = [j for j in range(4) if mask >> j & 1]
        row = f"| {rank} | {mask:04b} | {positions[0]}, {positions[1]} |"
        assert row in SPECIFICATION
        weight = torch.tensor([[float(mask >> j & 1) for j in range(4)]])
        assert compress(weight, "nm", NM(2, 4))["nm"].tolist() == [rank]


def test_the_word_table_of_the_specification():
    rows = re.findall(r"^\| (\d+):(\d+) \| .*$", SPECIFICATION, re.M)
    assert len(rows) == 9
    for n, m in (map(int, row) for row in rows):
        sets = math.comb(m, n)
        size, ranks = word_of(sets)
        bits = f"{8 * size / ranks:.3f} | {math.log2(sets):.3f}"
        assert f"| {n}:{m} | {sets} | {size} | {ranks} | {bits} |" in SPECIFICATION
        for groups in (ranks, ranks + 1):
            coded = compress(torch.zeros(groups, m), "nm", NM(n, m))["nm"]
            assert coded.numel() == -(-groups // ranks) * size


def position_bits(density):
    """Entropy of the mask, and the bits that each format takes, per weight."""
    q = 1 - density
    entropy = -density * math.log2(density) - q * math.log2(q)
    gap4, gap8 = 4 * density / (1 - q**15), 8 * density / (1 - q**255)
    return entropy, {"bitmask": 1.0, "gap4": gap4, "gap8": gap8}


def test_the_size_table_of_the_specification():
    rows = re.findall(r"^\| (0\.\d+) \|(?:[^|]*\|){7}$", SPECIFICATION, re.M)
    assert len(rows) == 9
    for sparsity in rows:
        density = round(1 - float(sparsity), 6)
        entropy, taken = position_bits(density)
        shortest = min(taken, key=taken.get)
        ratios = [
            (density * value + taken[shortest]) / (density * value + entropy) for value in (32, 16)
        ]
        cells = [f"{number:.3f}" for number in (entropy, *taken.values())]
        cells += [f"`{shortest}`", *(f"{ratio:.3f}" for ratio in ratios)]
        assert f"| {sparsity} | {' | '.join(cells)} |" in SPECIFICATION


def test_the_size_formulas_of_the_specification_are_what_compress_takes():
    uniform = torch.rand(512, 1024, generator=torch.Generator().manual_seed(0))
    for density in (0.5, 0.2, 0.05, 0.01):
        weight = (uniform < density).float()
        for name, bits in position_bits(density)[1].items():
            measured = 8 * compress(weight, name)[name].numel() / weight.numel()
            assert measured == pytest.approx(bits, rel=0.02)


def test_the_2_4_sizes_of_the_specification():
    sizes = [(2 * value + 8 / 3) / (2 * value + math.log2(6)) for value in (32, 16)]
    wording = f"2:4 takes {sizes[0]:.3f} times the bound in fp32 and {sizes[1]:.3f} times in bf16"
    assert wording in " ".join(SPECIFICATION.split())


def test_the_size_table_of_coded_values():
    rows = re.findall(r"^\| (0\.\d+) \|(?:[^|]*\|){5}$", SPECIFICATION, re.M)
    assert len(rows) == 9
    for sparsity in rows:
        density = round(1 - float(sparsity), 6)
        q = 1 - density
        entropy, taken = position_bits(density)
        taken["rice"] = min(density * (1 + low + q**2**low / (1 - q**2**low)) for low in range(12))
        shortest = min(taken, key=taken.get)
        ratios = [
            (density * bits + taken[shortest] + 0.5) / (density * bits + entropy + 0.5)
            for bits in (8, 4)
        ]
        cells = [f"{entropy:.3f}", f"{taken['rice']:.3f}", f"`{shortest}`"]
        cells += [f"{ratio:.3f}" for ratio in ratios]
        assert f"| {sparsity} | {' | '.join(cells)} |" in SPECIFICATION


def test_the_config_of_the_specification_is_what_we_write():
    texts = re.findall(r"^```json\n(.*?)^```", SPECIFICATION, re.M | re.S)
    config = {name: value for text in texts for name, value in json.loads(text).items()}
    stored = config["quantization_config"]
    assert stored.pop("quant_method") == "hf_sparse"
    assert SparsityConfig.from_dict(stored).to_dict() == stored
    assert f"# The checkpoint format, version {CONFIG_VERSION}\n" in SPECIFICATION


def test_the_specification_names_every_part():
    for name in CODED:
        assert f"`w.{name}`" in SPECIFICATION
