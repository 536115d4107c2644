"""The user's cache directory: remembered analyses, and named copies of programs."""
