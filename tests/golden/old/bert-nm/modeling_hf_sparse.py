"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""

from hf_sparse import SparseBertConfig

__all__ = ["SparseBertConfig"]
