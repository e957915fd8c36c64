"""What was done to a model, from its dense original on.

A `Provenance` is a plain value (`values`). It hangs on a model as one attribute (`record`), to which
all that change a model add their step. A checkpoint has it as one entry of `config.json` (`entry`),
from where the loader, and transformers itself, bring it back. The model card is made from it.
"""
