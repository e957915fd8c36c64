"""SparsityConfig: what survives JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse.configuration_sparse import CONFIG_VERSION, SparsityConfig, matches
from hf_sparse.formats import FORMATS, FormatError
from hf_sparse.patterns import NM, Head
from hf_sparse.quantization import Grid

globs = st.lists(st.text("abc.*?0_", min_size=1, max_size=8), min_size=1, max_size=3)


@given(
    pattern=st.sampled_from(["unstructured", "block:4x1", "row", "column", "head", "head:64"]),
    sparsity=st.floats(0, 1, exclude_max=True),
    targets=st.none() | globs,
    ignore=st.none() | globs,
    format=st.sampled_from(list(FORMATS)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_json_gives_the_config_back(pattern, sparsity, targets, ignore, format):
    config = SparsityConfig(pattern, sparsity, targets, ignore, format)
    assert SparsityConfig.from_json(config.to_json()) == config
    assert SparsityConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_json_of_a_file(tmp_path):
    config = SparsityConfig("2:4", ignore="lm_head")
    (tmp_path / "sparsity.json").write_text(config.to_json())
    assert SparsityConfig.from_json(tmp_path / "sparsity.json") == config


def test_the_stored_values():
    assert SparsityConfig("2:4", targets="q_proj", format="nm").to_dict() == {
        "version": 1,
        "pattern": "2:4",
        "sparsity": 0.5,
        "targets": ["q_proj"],
        "ignore": [],
        "format": "nm",
    }


def test_from_dict_leaves_its_argument_as_it_was():
    stored = SparsityConfig("2:4").to_dict()
    SparsityConfig.from_dict(stored)
    assert stored == SparsityConfig("2:4").to_dict()


def test_missing_keys_take_their_defaults():
    assert SparsityConfig.from_dict({"sparsity": 0.5}) == SparsityConfig("unstructured", 0.5)


def test_unknown_keys_are_refused_with_a_list():
    stored = {**SparsityConfig("2:4").to_dict(), "lam": 1, "block_size": 8}
    with pytest.raises(ValueError, match=r"\['block_size', 'lam'\]") as raised:
        SparsityConfig.from_dict(stored)
    assert all(field.name in str(raised.value) for field in fields(SparsityConfig))


def test_a_newer_version_is_refused():
    stored = {**SparsityConfig("2:4").to_dict(), "version": CONFIG_VERSION + 1}
    with pytest.raises(FormatError, match=f"version {CONFIG_VERSION + 1}.*Upgrade"):
        SparsityConfig.from_dict(stored)


def test_a_newer_version_is_refused_before_its_unknown_keys():
    with pytest.raises(FormatError, match="Upgrade"):
        SparsityConfig.from_dict({"version": CONFIG_VERSION + 1, "new_key": 1})


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.0])
def test_what_is_no_version_is_refused(version):
    with pytest.raises(FormatError, match="wanted 1 or more"):
        SparsityConfig.from_dict({"version": version, "pattern": "2:4"})


@pytest.mark.parametrize(("pattern", "implied"), [("2:4", 0.5), ("1:4", 0.75), ("3:8", 0.625)])
def test_nm_fixes_the_sparsity(pattern, implied):
    assert SparsityConfig(pattern).sparsity == implied
    assert SparsityConfig(pattern, implied) == SparsityConfig(pattern)
    assert SparsityConfig(pattern, implied + 1e-9) == SparsityConfig(pattern)
    for other in (0.0, implied - 0.01, 0.9):
        with pytest.raises(ValueError, match=f"'{pattern}' fixes the sparsity at {implied}"):
            SparsityConfig(pattern, other)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "row", "column", "head:64"])
def test_other_patterns_need_a_sparsity(pattern):
    with pytest.raises(ValueError, match=f"'{pattern}' needs a sparsity"):
        SparsityConfig(pattern)


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1, 1.0, 2, float("nan"), float("inf"), "0.5", True, [0.5]]
)
def test_what_is_no_sparsity_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity is "):
        SparsityConfig("unstructured", sparsity)


def test_unknown_patterns_and_formats_are_refused():
    with pytest.raises(ValueError, match=r"unknown pattern 'rows'.*unstructured"):
        SparsityConfig("rows", 0.5)
    with pytest.raises(ValueError, match="unknown format 'zip'") as raised:
        SparsityConfig("2:4", format="zip")
    assert all(name in str(raised.value) for name in FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_accepted(name):
    assert SparsityConfig("2:4", format=name).format == name


def test_a_pattern_is_taken_as_value_or_notation():
    assert SparsityConfig(NM(2, 4)) == SparsityConfig("2:4")
    assert SparsityConfig(Head(64), 0.5) == SparsityConfig("head:64", 0.5)


def test_one_glob_is_a_list_of_one():
    config = SparsityConfig("2:4", targets="q_proj", ignore="layers.0.*")
    assert config == SparsityConfig("2:4", targets=["q_proj"], ignore=("layers.0.*",))
    assert config.targets == ("q_proj",)


@pytest.mark.parametrize("globs", [[""], [1], ["q_proj", None]])
@pytest.mark.parametrize("name", ["targets", "ignore"])
def test_what_is_no_glob_is_refused(name, globs):
    with pytest.raises(ValueError, match=f"{name} is "):
        SparsityConfig("2:4", **{name: globs})


def test_empty_targets_are_refused_and_empty_ignore_is_none():
    with pytest.raises(ValueError, match="targets is empty"):
        SparsityConfig("2:4", targets=[])
    assert SparsityConfig("2:4", ignore=[]) == SparsityConfig("2:4")


def test_a_config_is_an_immutable_value():
    config = SparsityConfig("2:4")
    with pytest.raises(FrozenInstanceError):
        config.sparsity = 0.9
    assert len({config, SparsityConfig("2:4"), SparsityConfig("1:4")}) == 2


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("model.layers.0.mlp.up_proj", True),
        ("up_proj", True),
        ("mlp.up_proj", True),
        ("layers.0.*", True),
        ("model.layers.?.mlp.*", True),
        ("*.mlp.*", True),
        ("[mn]lp.up_proj", True),
        ("proj", False),
        ("p_proj", False),
        ("model.layers.0", False),
        ("layers.1.*", False),
        ("UP_PROJ", False),
        ("up_proj.weight", False),
    ],
)
def test_globs_match_the_name_or_its_end_from_a_dot(glob, expected):
    assert matches("model.layers.0.mlp.up_proj", glob) == expected
    assert SparsityConfig("2:4", ignore=glob).ignores("model.layers.0.mlp.up_proj") == expected


def test_ignores_any_of_several_globs():
    config = SparsityConfig("2:4", ignore=["layers.0.*", "lm_head"])
    assert config.ignores("model.layers.0.mlp")
    assert config.ignores("lm_head")
    assert not config.ignores("model.layers.1.mlp")
    assert not SparsityConfig("2:4").ignores("lm_head")


@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([None, 32, 64, 128]),
    symmetric=st.booleans(),
    embedding_bits=st.none() | st.sampled_from([4, 8]),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_grid_survives_json_and_stands_in_its_repr(bits, group_size, symmetric, embedding_bits):
    config = SparsityConfig(
        "2:4",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        embedding_bits=embedding_bits,
    )
    assert SparsityConfig.from_json(config.to_json()) == config
    assert eval(repr(config)) == config
    assert config.grid == Grid(bits, group_size, symmetric)
    assert (config.embedding_grid is None) == (embedding_bits is None)


def test_older_readers_meet_no_new_key_where_there_is_no_grid():
    assert not {"bits", "group_size", "symmetric"} & set(SparsityConfig("2:4").to_dict())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": 3}, "bits is 3; wanted 8 or 4"),
        ({"embedding_bits": 16}, "bits is 16; wanted 8 or 4"),
        ({"bits": 4, "group_size": 100}, "group_size is 100"),
        ({"group_size": 32}, "no bits are given"),
        ({"symmetric": False}, "no bits are given"),
    ],
)
def test_what_is_no_grid_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        SparsityConfig("2:4", **values)
