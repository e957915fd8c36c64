"""Zero-shot tasks: choices that a language model makes by the likelihood of texts."""
