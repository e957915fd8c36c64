"""Sparsity patterns: which zeros a weight may have.

A pattern is parsed once from its notation into an immutable value and printed back with `str`:

| notation       | zeros come as                                              | `sparsity` counts |
|----------------|------------------------------------------------------------|-------------------|
| `unstructured` | single weights                                             | weights           |
| `2:4` (N:M)    | at most N nonzeros in each M consecutive weights of a row  | fixed: 1 - N/M    |
| `block:RxC`    | whole blocks of R rows (out) x C columns (in)              | blocks            |
| `row`          | whole rows: one output feature                             | rows              |
| `column`       | whole columns: one input feature                           | columns           |
| `head:D`       | D consecutive rows: the output features of one head        | heads             |
| `head_in:D`    | D consecutive columns: the input features of one head      | heads             |
| `expert`       | whole experts of a mixture, all matrices of each           | experts           |

`head` without a size is completed by `Pattern.with_size(head_dim)` from the model's config. Where an
attention head is a unit of its own, it is `head_in:D` of the projection behind attention.

Every tensor here is `(out_features, in_features)`; layers that store the transpose (GPT-2's
`Conv1D`) are turned at the edge, never in a pattern.
"""

from hf_sparse.patterns.elements import NM, Unstructured
from hf_sparse.patterns.groups import Block, Column, Expert, GroupPattern, Head, Row
from hf_sparse.patterns.pattern import Pattern
from hf_sparse.patterns.ranking import lowest

__all__ = [
    "NM",
    "Block",
    "Column",
    "Expert",
    "GroupPattern",
    "Head",
    "Pattern",
    "Row",
    "Unstructured",
    "lowest",
]
