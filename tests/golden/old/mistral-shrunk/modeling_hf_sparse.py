"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""

from hf_sparse import SparseMistralConfig

__all__ = ["SparseMistralConfig"]
