"""SparseBertConfig and its siblings: a config class of each family, registered with AutoConfig."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hf_sparse.checkpoint.sparse_configs import SparseConfigMixin, base_config_class
from hf_sparse.structure.families import FAMILIES, sparse_type


class _Registering(SparseConfigMixin):
    """Registers the model classes of its family when a config is made.

    An Auto class asks for the class of a config right after it made that; importing all model classes
    before would take about a second.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        from hf_sparse.models.modeling import register_models

        super().__post_init__(**kwargs)
        register_models(self.base_model_type)


def _define(model_type: str) -> type[PreTrainedConfig]:
    base = base_config_class(model_type)
    name = f"Sparse{base.__name__}"
    body = {
        "model_type": sparse_type(model_type),
        "base_model_type": model_type,
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a sparse checkpoint. Takes the same arguments.",
    }
    return type(name, (_Registering, base), body)


CONFIGS = {model_type: _define(model_type) for model_type in FAMILIES}
globals().update({config.__name__: config for config in CONFIGS.values()})

for config_class in CONFIGS.values():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
