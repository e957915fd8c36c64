"""What hf_sparse uses of transformers beyond its public interface, by subject."""
