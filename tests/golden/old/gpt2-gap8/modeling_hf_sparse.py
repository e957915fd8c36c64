"""This checkpoint is compressed by hf_sparse: pip install hf_sparse"""

from hf_sparse import SparseGPT2Config

__all__ = ["SparseGPT2Config"]
