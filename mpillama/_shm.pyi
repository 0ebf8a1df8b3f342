from collections.abc import Callable, Sequence

import numpy as np

Watch = Callable[[list[int], bool], None]

class Segment:
    def __init__(self, memory: np.ndarray, rank: int, size: int, capacity: int, spins: int) -> None: ...
    @staticmethod
    def bytes(size: int, capacity: int) -> int: ...
    @property
    def capacity(self) -> int: ...
    def allreduce(self, x: np.ndarray, direct: int, watch: Watch) -> None: ...
    def reduce(self, x: np.ndarray, n_carriers: int, watch: Watch) -> np.ndarray | None: ...
    def spread(self, x: np.ndarray, n_carriers: int, watch: Watch) -> None: ...
    def allgather(self, x: np.ndarray, n_rows: int, widths: Sequence[int], out: np.ndarray, watch: Watch) -> None: ...

class AllreduceCall:
    def __init__(
        self,
        segment: Segment,
        x: np.ndarray,
        direct: int,
        watch: Callable[[list[int], bool, bool], None],
        place: np.ndarray,
        kind: int,
        counts: np.ndarray,
    ) -> None: ...
    @property
    def capsule(self) -> object: ...
