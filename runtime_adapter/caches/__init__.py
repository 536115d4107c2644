"""Live caches: tensors of a loaded method, or of the caller, as a store reads and writes them."""
