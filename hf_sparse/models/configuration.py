"""SparseBertConfig and its siblings: a config class of each family, made when it is asked for."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from hf_sparse.checkpoint.sparse_configs import (
    UNKNOWN_TYPE,
    SparseConfigMixin,
    sparse_config_class,
    type_of,
)
from hf_sparse.formats import FormatError
from hf_sparse.structure.families import base_type, sparse_type
from hf_sparse.upstream.transformers.configs import extend_types_, registered_configs
from hf_sparse.upstream.transformers.models import is_from_transformers


class _Registering(SparseConfigMixin):
    """Registers the model classes of its family when a config is made.

    An Auto class asks for the class of a config right after it made that; importing all model classes
    before would take about a second.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        from hf_sparse.models.modeling import register_models

        super().__post_init__(**kwargs)
        register_models(self.base_model_type)


class _SparseTypes(dict[str, type[PreTrainedConfig]]):
    """The config classes that are registered with AutoConfig, and a Sparse one for every family.

    Those are made when their type is asked for: making all would import the configs of all families.
    """

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        return isinstance(key, str) and sparse_type(base_type(key)) == key

    def __missing__(self, key: str) -> type[PreTrainedConfig]:
        if key not in self:
            raise KeyError(key)
        family = base_type(key)
        if family == base_type(family) and family in CONFIG_MAPPING:
            made = self[key] = _define(CONFIG_MAPPING[family], key)
            return made
        return _Unknown  # which may be known later


class _Unknown(PreTrainedConfig):
    """Stands for the configs of families that are not known here: files of theirs are refused.

    Without it transformers would ask whether to run the code beside a checkpoint, which can only import
    this package.
    """

    # Of a class of other modules, transformers ignores that code may be run, where it may.
    __module__ = "transformers.hf_sparse"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Refuse the values.

        Raises:
            FormatError: always.
        """
        raise FormatError(UNKNOWN_TYPE.format(config_dict.get("model_type")))


def _define(base: type[PreTrainedConfig], model_type: str) -> type[PreTrainedConfig]:
    body: dict[str, Any] = {
        "model_type": model_type,
        "base_model_type": base_type(model_type),
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a sparse checkpoint. Takes the same arguments.",
    }
    if not is_from_transformers(base):  # it may set its values there
        body["__init__"] = lambda self, *args, **values: base.__init__(self, *args, **values)
    return type(f"Sparse{base.__name__}", (_Registering, base), body)


extend_types_(_SparseTypes)


def __getattr__(name: str) -> Any:
    """The Sparse class of a config by its name."""
    if name.startswith("Sparse") and name.endswith("Config"):
        wanted = name.removeprefix("Sparse")
        own = getattr(transformers, wanted, None)
        registered = registered_configs()
        for base in (own, *registered):
            named = getattr(base, "__name__", "") == wanted
            if named and (model_type := type_of(base)) is not None:
                return sparse_config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
