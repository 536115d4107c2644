"""The state of a method: which tensors outlive a call, and of what kind each is.

Found from instructions alone, never from names; pure.
"""
