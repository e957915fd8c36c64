"""Pages about models, for people to look at: `hf_sparse.report`, and its pictures.

`sources` finds the models, `facts` reads one of them, a matrix at a time, into plain values.
`pictures` draws these values with Matplotlib; `contents` puts words, tables and pictures in order, and
`templates/` makes one HTML file of them. Nothing in the file is fetched from anywhere.
"""
