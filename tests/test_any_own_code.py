"""Models with code of their own: stored compressed once the Auto classes know it, refused before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_sparse
from hf_sparse import SparsityConfig

TYPE = "own_kind"


class OwnConfig(PreTrainedConfig):
    """Of the older form, which most code on the Hub has."""

    model_type = TYPE

    def __init__(self, width: int = 16, depth: int = 2, **values: Any) -> None:
        self.width, self.depth = width, depth
        self.double = 2 * width
        super().__init__(**values)


class OwnBlock(nn.Module):
    """Two layers, one behind the other."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(config.width, config.double),
            nn.Linear(config.double, config.width),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.up(hidden).relu())


class OwnModel(PreTrainedModel):
    """A model that transformers does not have."""

    config_class = OwnConfig
    base_model_prefix = "own"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.parts = nn.ModuleList([OwnBlock(config) for _ in range(config.depth)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            hidden = part(hidden)
        return hidden


def model() -> OwnModel:
    torch.manual_seed(0)
    return OwnModel(OwnConfig(width=12)).eval()


@pytest.fixture
def registered() -> Iterator[None]:
    AutoConfig.register(TYPE, OwnConfig)
    AutoModel.register(OwnConfig, OwnModel)
    yield
    forget()


def forget() -> None:
    """What a new process knows of the code: nothing."""
    for known in (TYPE, f"sparse_{TYPE}"):
        CONFIG_MAPPING._extra_content.pop(known, None)
    AutoModel._model_mapping._extra_content.pop(OwnConfig, None)


@pytest.mark.usefixtures("registered")
def test_registered_code_is_stored_and_loaded(tmp_path: Path) -> None:
    own = model()
    hf_sparse.prune_(own, SparsityConfig("2:4"), "magnitude")
    hf_sparse.save_pretrained(own, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, OwnModel)
    assert type(loaded).__name__ == "SparseOwnModel"
    assert (loaded.config.width, loaded.config.double) == (12, 24)
    for name, value in own.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert hf_sparse.inspect_checkpoint(tmp_path).report.sparsity == 0.5
    assert hf_sparse.SparseOwnModel is type(loaded)
    assert hf_sparse.SparseOwnConfig is type(loaded.config)
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").config.double == 24


def test_code_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    own = model()
    hf_sparse.prune_(own, SparsityConfig("2:4"), "magnitude")
    with pytest.raises(ValueError, match=rf"AutoConfig.register\('{TYPE}', OwnConfig\)"):
        hf_sparse.save_pretrained(own, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
    hf_sparse.save_pretrained(own, tmp_path / "dense", SparsityConfig("2:4", format="dense"))
    assert torch.equal(
        OwnModel.from_pretrained(tmp_path / "dense").parts[0].up.weight, own.parts[0].up.weight
    )


@pytest.mark.usefixtures("registered")
def test_where_the_code_is_missing_loading_tells_to_register_it(tmp_path: Path) -> None:
    hf_sparse.save_pretrained(model(), tmp_path, SparsityConfig("unstructured", 0.0))
    forget()
    with pytest.raises(ImportError, match=rf"AutoConfig.register\('{TYPE}', OwnConfig\)"):
        AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(hf_sparse.FormatError, match=rf"model_type is 'sparse_{TYPE}'.*register"):
        hf_sparse.inspect_checkpoint(tmp_path)
