"""Formats: bit-exact round trips, plain encoders to compare with, sizes, and damaged parts."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.formats import (
    FORMATS,
    FormatError,
    compress,
    decompress,
    group_parts,
    join,
    locate,
    num_bytes,
    split_name,
)
from hf_sparse.patterns import NM, GroupPattern, Pattern
from tests.support.crosses import cross, pairwise
from tests.support.damaged_parts import decompressed_unless_refused

EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)
CODED = [name for name in FORMATS if name not in ("auto", "dense")]
DTYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
PATTERNS = ["unstructured", "1:4", "2:4", "4:8", "8:16", "1:1000", "block:1x1", "block:2x4"] + [
    "row",
    "column",
    "head:2",
]
SHAPES = [(1, 1), (3, 5), (7, 16), (1, 64), (64, 1), (16, 32), (0, 8), (8, 0)]
FILLS = ["half", "tenth", "none", "all", "empty rows", "full rows"]


def random_weight(rows, columns, dtype=torch.float32, fill="half", seed=0):
    """Random values, some of them zero, with -0.0, NaN, infinities and a subnormal among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    chance = {"half": 0.5, "tenth": 0.1, "none": 0.0, "all": 1.0}.get(fill, 0.3)
    weight[torch.rand(rows, columns, generator=generator) >= chance] = 0.0
    weight = weight.to(dtype)
    if fill == "empty rows":
        weight[::2] = 0.0
    elif fill == "full rows":
        weight[::2] = 1.0
    odd = [-0.0, float("nan"), float("inf"), float("-inf"), torch.finfo(dtype).smallest_normal / 2]
    if weight.numel() >= 16 and fill != "none":
        weight.view(-1)[:5] = torch.tensor(odd).to(dtype)
    return weight


def bits_of(weight):
    return weight.contiguous().view(DTYPES[weight.dtype])


def without_negative_zeros(weight):
    return torch.where(weight.double() == 0, torch.zeros(()), weight.double()).to(weight.dtype)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(bits_of(found), bits_of(expected))


def pruned_to(pattern, weight):
    """The weight with what the pattern forbids set to zero; None if it does not divide the shape."""
    if not isinstance(pattern, NM | GroupPattern):
        return weight
    scores = weight.double().abs().nan_to_num(1, 1)
    try:
        return torch.where(pattern.keep(scores, 0.5), weight.double(), 0.0).to(weight.dtype)
    except ValueError:
        return None


def can_hold(name, pattern):
    if name == "nm":
        return isinstance(pattern, NM) and pattern.m <= 16
    return isinstance(pattern, GroupPattern) if name == "block" else True


@pytest.mark.few(8)
@pairwise(
    "transposed, notation, name, dtype",
    [False, True],
    PATTERNS,
    FORMATS,
    [torch.float32, torch.float16, torch.bfloat16, torch.float64],
)
def test_round_trip_is_exact(name, notation, transposed, dtype):
    pattern = Pattern.parse(notation)
    if not can_hold(name, pattern):
        with pytest.raises(ValueError, match=f"format '{name}'"):
            compress(torch.ones(8, 16), name, pattern, transposed=transposed)
        return
    done = 0
    for shape in SHAPES:
        for fill in FILLS:
            weight = pruned_to(pattern, random_weight(*shape, dtype, fill))
            if weight is None:
                continue
            stored = weight.T.contiguous() if transposed else weight
            parts = compress(stored, name, pattern, transposed=transposed)
            if parts.keys() == {""}:
                assert_same_bits(parts[""], stored)
            else:
                assert_same_bits(decompress(parts), without_negative_zeros(stored))
            done += 1
    assert done >= len(FILLS)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_a_type_survives(name, dtype):
    kinds = 256 if dtype.itemsize == 1 else 65536
    patterns = torch.arange(kinds, dtype=torch.int64) << 8 * dtype.itemsize - kinds.bit_length() + 1
    zero = torch.zeros(kinds, dtype=torch.int64)
    integers = torch.stack([patterns, zero, patterns, zero], dim=1).to(DTYPES[dtype])
    weight = integers.view(dtype)
    pattern = Pattern.parse({"nm": "2:4", "block": "block:1x2"}.get(name, "unstructured"))
    expected = integers.clone()
    expected[(integers << 1) == 0] = 0
    found = decompress(compress(weight, name, pattern))
    assert torch.equal(found.view(DTYPES[dtype]), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FORMATS)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12).map(lambda groups: 4 * groups),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
    transposed=st.booleans(),
)
@EXAMPLES
def test_round_trip_at_random_sparsity(name, rows, columns, sparsity, seed, transposed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) >= sparsity
    pattern = Pattern.parse({"nm": "2:4", "block": "block:1x4"}.get(name, "unstructured"))
    weight = pruned_to(pattern, weight)
    stored = weight.T.contiguous() if transposed else weight
    parts = compress(stored, name, pattern, transposed=transposed)
    if parts.keys() == {""}:
        assert_same_bits(parts[""], stored)
    else:
        restored = decompress(parts)
        assert restored.is_contiguous()
        assert_same_bits(restored, without_negative_zeros(stored))


@pytest.mark.parametrize("name", CODED)
def test_a_view_is_compressed_like_its_copy(name):
    pattern = Pattern.parse({"nm": "2:4", "block": "row"}.get(name, "unstructured"))
    weight = pruned_to(pattern, random_weight(8, 12))
    view = torch.zeros(12, 16)[:, ::2].copy_(weight.T).T
    assert not view.is_contiguous()
    for part, tensor in compress(weight, name, pattern).items():
        assert torch.equal(
            tensor.view(torch.uint8), compress(view, name, pattern)[part].view(torch.uint8)
        )


@pytest.mark.parametrize("name", FORMATS)
def test_compress_leaves_the_weight_as_it_was(name):
    pattern = Pattern.parse({"nm": "2:4", "block": "row"}.get(name, "unstructured"))
    weight = torch.tensor([[-0.0, 1.0, 0.0, 2.0]], requires_grad=True)
    before = bits_of(weight.detach()).clone()
    parts = compress(weight, name, pattern)
    assert torch.equal(bits_of(weight.detach()), before)
    assert not any(part.requires_grad for part in parts.values())


def slow_bitmask(nonzero):
    encoded = [0] * math.ceil(len(nonzero) / 8)
    for index, marked in enumerate(nonzero):
        encoded[index // 8] |= marked << index % 8
    return encoded


def slow_gaps(nonzero, width):
    skip, codes, gap = 2**width - 1, [], 0
    for marked in nonzero:
        if not marked:
            gap += 1
            continue
        codes += [skip] * (gap // skip) + [gap % skip]
        gap = 0
    if width == 8:
        return codes
    codes += [skip] * (len(codes) % 2)
    return [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]


def slow_nm(weights, n, m):
    """Values and bytes; words are chosen by bits per group, the shorter one where two are equal."""
    sets = sorted(combinations(range(m), n), key=lambda chosen: sum(2**j for j in chosen))
    fits = {size: int(8 * size // math.log2(len(sets))) for size in (1, 2, 4, 8)}
    size = min((size for size in fits if fits[size]), key=lambda size: size / fits[size])
    values, encoded, word, digit = [], [], 0, 0
    for start in range(0, len(weights), m):
        group = weights[start : start + m]
        chosen = {j for j in range(m) if group[j] != 0}
        free = [j for j in range(m) if j not in chosen]
        chosen = tuple(sorted(chosen | set(free[: n - len(chosen)])))
        values += [group[j] for j in chosen]
        word += sets.index(chosen) * len(sets) ** digit
        digit += 1
        if digit == fits[size] or start + m == len(weights):
            encoded += word.to_bytes(size, "little")
            word, digit = 0, 0
    return values, encoded


def slow_block(weight, height, width):
    values, kept = [], []
    for y in range(0, len(weight), height):
        for x in range(0, len(weight[0]), width):
            block = [value for row in weight[y : y + height] for value in row[x : x + width]]
            kept.append(any(block))
            values += block if any(block) else []
    return values, slow_bitmask(kept)


@given(st.lists(st.integers(0, 600) | st.integers(0, 20), max_size=12), st.integers(0, 40))
@EXAMPLES
def test_bitmask_and_gaps_equal_the_plain_encoders(gaps, tail):
    nonzero = [bit for gap in gaps for bit in [0] * gap + [1]] + [0] * tail
    weight = torch.tensor([nonzero], dtype=torch.float32).cumsum(1) * torch.tensor([nonzero])
    expected = {
        "bitmask": slow_bitmask(nonzero),
        "gap4": slow_gaps(nonzero, 4),
        "gap8": slow_gaps(nonzero, 8),
    }
    for name, coded in expected.items():
        parts = compress(weight, name)
        assert parts[""].tolist() == list(range(1, len(gaps) + 1))
        assert parts[name].tolist() == coded
        assert parts["layout"].tolist() == [1, len(nonzero), 0]


@pytest.mark.parametrize("gap", [14, 15, 16, 29, 30, 31, 254, 255, 256, 510, 511])
def test_gaps_around_the_skip_codes(gap):
    nonzero = [1, *[0] * gap, 1]
    weight = torch.tensor([nonzero], dtype=torch.float32)
    for name, width in (("gap4", 4), ("gap8", 8)):
        parts = compress(weight, name)
        assert parts[name].tolist() == slow_gaps(nonzero, width)
        assert torch.equal(decompress(parts), weight)


@pytest.mark.parametrize(
    "notation", ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "3:7", "1:16", "8:16"]
)
def test_nm_equals_the_plain_encoder(notation):
    pattern = Pattern.parse(notation)
    for groups in (1, 2, 3, 10, 37):
        weight = torch.randn(1, groups * pattern.m, generator=torch.Generator().manual_seed(groups))
        weight *= pattern.keep(weight.abs(), 0.0)
        weight[0, ::3] = 0.0
        parts = compress(weight, "nm", pattern)
        values, coded = slow_nm(weight[0].tolist(), pattern.n, pattern.m)
        assert parts[""].tolist() == values
        assert parts["nm"].tolist() == coded
        assert parts["layout"].tolist() == [1, weight.numel(), 0, pattern.n, pattern.m]


@pytest.mark.parametrize(
    "notation", ["block:1x1", "block:2x4", "block:4x1", "row", "column", "head:3"]
)
def test_block_equals_the_plain_encoder(notation):
    pattern = Pattern.parse(notation)
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    weight *= pattern.keep(weight.abs(), 0.6)
    weight[:, ::3] = 0.0
    shape = pattern.group_shape(12, 8)
    parts = compress(weight, "block", pattern)
    values, coded = slow_block(weight.tolist(), *shape)
    assert parts[""].tolist() == values
    assert parts["block"].tolist() == coded
    assert parts["layout"].tolist() == [12, 8, 0, *shape]


@pytest.mark.parametrize("name", CODED)
def test_layout_holds_the_stored_orientation(name):
    """`nm` and `block` store (out, in); the others store the weight as it stands."""
    pattern = Pattern.parse({"nm": "2:4", "block": "row"}.get(name, "unstructured"))
    weight = pruned_to(pattern, random_weight(8, 12)).T.contiguous()
    layout = compress(weight, name, pattern, transposed=True)["layout"].tolist()
    turned = name in ("nm", "block")
    assert layout[:3] == ([8, 12, 1] if turned else [12, 8, 0])


def test_conv1d_groups_run_along_in_features():
    weight = torch.tensor([[1.0, 0, 5], [2, 3, 0], [0, 0, 0], [0, 4, 6]])
    with pytest.raises(ValueError, match="divisible by M = 4"):
        compress(weight, "nm", NM(2, 4))
    parts = compress(weight, "nm", NM(2, 4), transposed=True)
    assert parts[""].tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(decompress(parts), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sparsity", "bound"), [(0.5, 1.03), (0.7, 1.03), (0.8, 1.03), (0.9, 1.03), (0.95, 1.08)]
)
def test_size_is_near_the_entropy_bound(dtype, sparsity, bound):
    weight = torch.randn(1536, 384, generator=torch.Generator().manual_seed(1))
    weight *= Pattern.parse("unstructured").keep(weight.abs(), sparsity)
    nnz = int(weight.count_nonzero())
    chance = nnz / weight.numel()
    entropy = -chance * math.log2(chance) - (1 - chance) * math.log2(1 - chance)
    least = nnz * dtype.itemsize + weight.numel() * entropy / 8
    parts = compress(weight.to(dtype))
    assert least < num_bytes(parts) <= bound * least
    assert_same_bits(decompress(parts), without_negative_zeros(weight.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_of_2_4_is_near_the_entropy_bound(dtype):
    weight = torch.randn(1536, 384, generator=torch.Generator().manual_seed(1))
    weight *= NM(2, 4).keep(weight.abs(), 0.5)
    least = weight.numel() / 2 * dtype.itemsize + weight.numel() / 4 * math.log2(6) / 8
    parts = compress(weight.to(dtype), "auto", NM(2, 4))
    assert "nm" in parts
    assert least < num_bytes(parts) <= 1.01 * least
    assert_same_bits(decompress(parts), without_negative_zeros(weight.to(dtype)))


@pytest.mark.few(2)
@pytest.mark.parametrize("notation", ["unstructured", "2:4", "1:16", "block:2x4", "row", "column"])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float64])
@given(density=st.floats(0, 1), shape=st.sampled_from(SHAPES), transposed=st.booleans())
@EXAMPLES
def test_auto_is_never_larger_than_another_format(notation, dtype, density, shape, transposed):
    weight = torch.ones(shape) * (torch.arange(math.prod(shape)).view(shape) * 0.618 % 1 < density)
    pattern = Pattern.parse(notation)
    smallest = num_bytes(compress(weight.to(dtype), "auto", pattern, transposed=transposed))
    for name in FORMATS:
        if name == "rice":  # for coded values: of others, older versions read what `auto` writes
            continue
        try:
            parts = compress(weight.to(dtype), name, pattern, transposed=transposed)
        except ValueError:
            continue
        assert smallest <= num_bytes(parts)


@pytest.mark.parametrize(
    ("density", "expected"),
    [(1.0, {""}), (0.5, {"", "bitmask", "layout"}), (0.1, {"", "gap4", "layout"})]
    + [(0.004, {"", "gap8", "layout"})],
)
def test_auto_picks_by_density(density, expected):
    weight = torch.ones(64, 64) * (torch.arange(4096).view(64, 64) * 0.618034 % 1 < density)
    assert compress(weight).keys() == expected


def test_auto_stores_what_breaks_the_pattern_without_it():
    weight = torch.zeros(64, 64)
    weight[0, :3] = 1.0
    parts = compress(weight, "auto", NM(2, 4))
    assert "nm" not in parts
    assert torch.equal(decompress(parts), weight)


def test_nm_refuses_a_group_with_too_many_nonzeros():
    weight = torch.zeros(2, 8)
    weight[1, 4:7] = 1.0
    with pytest.raises(ValueError, match=r"1 of 4 groups .* group 3"):
        compress(weight, "nm", NM(2, 4))


@cross(
    "name, weight",
    FORMATS,
    [torch.ones(4), torch.ones(2, 2, 2, 2), torch.ones(2, 2, dtype=torch.int32)]
    + [torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.bool)]
    + [torch.full((2, 2), 128, dtype=torch.uint8).view(torch.float8_e4m3fnuz)],
)
def test_what_is_no_weight_is_refused(name, weight):
    with pytest.raises(ValueError, match="2-D"):
        compress(weight, name)


def test_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'zip'") as raised:
        compress(torch.ones(2, 2), "zip")
    assert all(name in str(raised.value) for name in FORMATS)


def valid_parts(name, rows=6, columns=8):
    pattern = Pattern.parse({"nm": "2:4", "block": "block:2x4"}.get(name, "unstructured"))
    weight = pruned_to(pattern, torch.arange(1.0, 1 + rows * columns).view(rows, columns))
    if name not in ("nm", "block"):
        weight[:, 1::3] = 0.0
    return compress(weight, name, pattern)


def refused(parts):
    with pytest.raises(FormatError):
        decompress(parts)


@pytest.mark.parametrize("name", CODED)
def test_wrong_number_of_values_is_refused(name):
    parts = valid_parts(name)
    refused({**parts, "": parts[""][:-1]})
    refused({**parts, "": torch.cat([parts[""], torch.ones(1)])})
    refused({**parts, "": parts[""][:0]})


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("fill", [0, 0xFF])
def test_truncated_and_overlong_positions_are_refused(name, fill):
    parts = valid_parts(name)
    refused({**parts, name: parts[name][:-1]})
    refused({**parts, name: parts[name][:0]})
    refused({**parts, name: torch.cat([parts[name], torch.tensor([fill], dtype=torch.uint8)])})


@pytest.mark.parametrize("name", CODED)
def test_missing_and_surplus_parts_are_refused(name):
    parts = valid_parts(name)
    for missing in parts:
        refused({part: tensor for part, tensor in parts.items() if part != missing})
    refused({})
    for other in CODED:
        if other != name:
            refused({**parts, other: parts[name]})
    refused({**parts, "scale": torch.ones(1)})


@pytest.mark.parametrize("name", CODED)
def test_wrong_types_and_shapes_of_parts_are_refused(name):
    parts = valid_parts(name)
    fnuz = parts[""].to(torch.float8_e4m3fnuz)
    for values in (parts[""].int(), parts[""].bool(), parts[""][None], parts[""][0], fnuz):
        refused({**parts, "": values})
    for coded in (parts[name].to(torch.int8), parts[name].float(), parts[name][None]):
        refused({**parts, name: coded})
    for layout in (parts["layout"].int(), parts["layout"].double(), parts["layout"][None]):
        refused({**parts, "layout": layout})
    refused({**parts, "layout": parts["layout"][:-1]})
    refused({**parts, "layout": torch.cat([parts["layout"], torch.tensor([1, 1])])})


@pytest.mark.parametrize("name", CODED)
def test_wrong_layouts_are_refused(name):
    parts = valid_parts(name)
    valid = parts["layout"].tolist()
    wrong = [[-6, -8], [-6, 8], [6, -8], [2**31, 8], [6, 2**31], [2**62, 4], [2**30, 2**30], [0, 0]]
    wrong += [[6, 0], [0, 8], [-1, 0], [2, 8]]
    if name not in ("gap4", "gap8", "rice"):
        wrong += [[60, 8], [6, 80]]
    for rows, columns in wrong:
        refused({**parts, "layout": torch.tensor([rows, columns, *valid[2:]])})
    for flag in (-1, 2, 2**40):
        refused({**parts, "layout": torch.tensor([*valid[:2], flag, *valid[3:]])})
    if name in ("nm", "block"):
        for parameters in (
            [0, 0],
            [-1, 4],
            [2, -4],
            [2, 0],
            [3, 4],
            [4, 4],
            [2, 2**40],
            [2**40, 4],
        ):
            refused({**parts, "layout": torch.tensor([*valid[:3], *parameters])})


def test_layouts_too_large_for_the_machine_are_refused():
    nothing = {"": torch.zeros(0, dtype=torch.float64), "layout": torch.tensor([2**30, 2**30, 0])}
    for name in ("bitmask", "gap4", "gap8"):
        refused({**nothing, name: torch.zeros(0, dtype=torch.uint8)})
    one_block = torch.tensor([2**30, 2**30, 0, 2**30, 2**30])
    refused({**nothing, "layout": one_block, "block": torch.zeros(1, dtype=torch.uint8)})


@pytest.mark.parametrize("name", ["gap4", "gap8", "block", "rice"])
def test_a_weight_that_does_not_fit_in_memory_is_refused(name, monkeypatch):
    def zeros(*args, **kwargs):
        raise MemoryError

    parts = valid_parts(name)
    monkeypatch.setattr("numpy.zeros", zeros)
    with pytest.raises(FormatError, match="6 x 8 does not fit in memory"):
        decompress(parts)


def with_bytes(parts, name, *coded):
    return {**parts, name: torch.tensor(coded, dtype=torch.uint8)}


def test_bits_behind_the_last_weight_are_refused():
    parts = compress(torch.tensor([[1.0, 0.0, 2.0]]), "bitmask")
    assert parts["bitmask"].tolist() == [0b101]
    for bit in range(3, 8):
        refused(with_bytes(parts, "bitmask", 0b101 | 1 << bit))
    parts = compress(torch.eye(6), "block", Pattern.parse("block:2x2"))
    first, last = parts["block"].tolist()
    for bit in range(1, 8):
        refused(with_bytes(parts, "block", first, last | 1 << bit))


def test_gaps_out_of_range_are_refused():
    weight = torch.zeros(1, 40)
    weight[0, 39] = 1.0
    parts = compress(weight, "gap4")
    assert parts["gap4"].tolist() == [0xFF, 0xF9]
    refused(with_bytes(parts, "gap4", 0xFF, 0xFA))
    refused(with_bytes(parts, "gap4", 0xFF, 0xFF, 0xF0))
    parts = compress(weight, "gap8")
    assert parts["gap8"].tolist() == [39]
    refused(with_bytes(parts, "gap8", 40))
    refused(with_bytes(parts, "gap8", 0xFF, 0))


def test_skips_behind_the_last_value_are_refused():
    parts = compress(torch.tensor([[1.0, 0.0, 2.0]]), "gap4")
    assert parts["gap4"].tolist() == [0x10]
    refused(with_bytes(parts, "gap4", 0x10, 0xFF))
    refused(with_bytes(compress(torch.zeros(1, 3), "gap4"), "gap4", 0xFF))
    parts = compress(torch.tensor([[1.0, 0.0, 2.0]]), "gap8")
    refused(with_bytes(parts, "gap8", 0, 1, 0xFF))
    refused(with_bytes(compress(torch.zeros(1, 3), "gap8"), "gap8", 0xFF))


def test_words_that_are_no_ranks_are_refused():
    parts = compress(torch.tensor([[1.0, 0, 2, 0, 3, 4, 0, 0]]), "nm", NM(2, 4))
    assert parts["nm"].tolist() == [1]
    assert decompress(with_bytes(parts, "nm", 35)).tolist() == [[0, 0, 1, 2, 0, 0, 3, 4]]
    for word in (36, 72, 215, 216, 255):
        refused(with_bytes(parts, "nm", word))


def test_format_errors_name_their_place():
    with pytest.raises(FormatError, match=r"^tensor w: found the parts"), locate("tensor w"):
        decompress({})


damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "grow", "layout"]), st.integers(0, 999), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def damaged(parts, name, damages):
    for kind, place, value in damages:
        part = ["", name][value % 2] if kind != "flip" else name
        tensor = parts[part]
        if kind == "layout":
            layout = parts["layout"].clone()
            small = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 48, -1, -8, 2**31, 2**40, 2**62]
            layout[place % len(layout)] = small[value % len(small)]
            parts = {**parts, "layout": layout}
        elif kind == "grow":
            parts = {**parts, part: torch.cat([tensor, torch.tensor([value]).to(tensor.dtype)])}
        elif kind == "cut":
            parts = {**parts, part: tensor[: place % (tensor.numel() + 1)]}
        elif tensor.numel():
            changed = tensor.clone()
            changed[place % tensor.numel()] = value
            parts = {**parts, part: changed}
    return parts


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CODED)
@given(damages=damages)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_damaged_parts_give_a_format_error_or_the_right_shape(name, damages):
    parts = damaged(valid_parts(name), name, damages)
    if (weight := decompressed_unless_refused(parts)) is None:
        return
    transposed = parts["layout"][2]
    assert weight.dtype == parts[""].dtype
    nonzero = parts[""][parts[""] != 0]
    restored = (weight.T if transposed else weight).flatten()
    assert sorted(restored[restored != 0].tolist()) == sorted(nonzero.tolist())


@pytest.mark.few(2)
@pytest.mark.parametrize("name", CODED)
def test_every_single_changed_byte_is_refused_or_moves_a_value(name):
    """No byte of the positions is ignored: a change is noticed or gives another weight."""
    parts = valid_parts(name)
    original = decompress(parts)
    for place in range(parts[name].numel()):
        for value in range(256):
            changed = parts[name].clone()
            changed[place] = value
            if torch.equal(changed, parts[name]):
                continue
            try:
                assert not torch.equal(decompress({**parts, name: changed}), original)
            except FormatError:
                continue


@pytest.mark.parametrize("part", ["", "layout", *CODED])
def test_split_name_undoes_join(part):
    for name in ("w", "weight", "model.layers.0.q_proj.weight", "a.layout.b"):
        assert split_name(join(name, part)) == (name, part)


def test_names_that_are_no_parts_stand_for_themselves():
    for key in ("weight", "layer.bias", "layout", "bitmask", ".nm", "w.scale", "nm.weight"):
        assert split_name(key) == (key, "")


def test_group_parts_gathers_the_parts_of_each_tensor():
    keys = ["b", "a.w", "a.w.layout", "a.w.gap4", "c.layout", "layout"]
    expected = {"b": [""], "a.w": ["", "gap4", "layout"], "c.layout": [""], "layout": [""]}
    assert group_parts(keys) == expected
    assert group_parts(iter(keys)) == expected
    assert group_parts([]) == {}
