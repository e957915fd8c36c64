"""Registers hf_sparse with transformers; importing the package imports this module.

The loader of compressed checkpoints and the config classes are registered at once, the model
classes when a config of their family is made: importing them takes about a second.
"""

from __future__ import annotations

from transformers import AutoConfig

from hf_sparse.checkpoint import quantizer as quantizer
from hf_sparse.checkpoint.sparse_configs import CONFIGS, SparseConfigMixin


def _register_models(model_type: str) -> None:
    from hf_sparse.models.modeling import register_models

    register_models(model_type)


SparseConfigMixin.when_made = staticmethod(_register_models)

for config_class in CONFIGS.values():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
