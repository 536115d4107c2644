"""What a method computes from positions alone: slots, masks, indices into tables.

Which slot a token goes to and which slots a query sees follow from the
position that the caller passes, the call's length and a ring's own bookkeeping;
token ids and weights have no part in it. So these instructions can be carried
out here, on small integer arrays, for any position that one likes to ask about.
That tells a ring from a full cache whatever operators an exporter chose.

Pure: no runtime, no torch. What cannot be computed is left out, never guessed.
"""

from runtime_adapter.state.arithmetic.call import Array, Value
from runtime_adapter.state.arithmetic.machine import Arithmetic

__all__ = ["Arithmetic", "Array", "Value"]
