"""The file: a ``.pte`` (and its ``.ptd``) as values: parsed, checked, digested, never run."""
