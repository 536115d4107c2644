"""ExecuTorch's runtime: the only room that touches its Python binding and loads its libraries."""
