"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""

from hf_sparse import SparseQwen3Config

__all__ = ["SparseQwen3Config"]
