"""Commands of ``kvstore`` that need a model; registered in the group ``kvstore.commands``."""
