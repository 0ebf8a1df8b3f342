"""What products make of their activations before they begin, for as long as other products may want the same."""

from __future__ import annotations

from mpillama.backends.gpu.device import Array, Device

# Those of a block's norm and of its experts: a shared expert wants the first again.
_KEPT = 2

Rounded = tuple[Array, ...]
"""In 8 bits: for each 32 elements int32 (8,) with four of them each, their scale, and the scaled sums of their halves.
In float16: rows, and the scale of each."""


class RoundedArrays:
    """What was rounded last, by the array that it was made of.

    Args:
        device: where the arrays are.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: list[tuple[Array, int, int, Rounded]] = []

    def find(self, x: Array, n_in: int, pad: int) -> Rounded | None:
        """Return what was made of this very array, in rows of ``n_in`` of which ``pad`` zeros come first.

        It may have had other axes, of the same numbers.
        """
        address = self._device.address(x)
        for i, (known, *size, rounded) in enumerate(self._kept):
            if self._device.address(known) == address and known.size == x.size and size == [n_in, pad]:
                self._kept.append(self._kept.pop(i))
                return rounded
        return None

    def keep(self, x: Array, n_in: int, pad: int, rounded: Rounded) -> Rounded:
        """Remember arrays that the caller fills from ``x`` before anybody finds them; x must not change after."""
        self._kept = [*self._kept[1 - _KEPT :], (x, n_in, pad, rounded)]
        return rounded

    def clear(self) -> None:
        """Forget all."""
        self._kept = []
