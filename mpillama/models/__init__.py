"""Model texts: what a transformer computes, with no word about who computes it.

Nothing in this package knows how many devices there are. `forward` is the one entry.
"""

from mpillama.models.transformer import forward

__all__ = ["forward"]
