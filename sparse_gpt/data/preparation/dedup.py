"""Which documents came before, by content hash."""

import numpy as np
import numpy.typing as npt


class Seen:
    """A set of 64-bit hashes in 8 bytes each (up to 24 while it grows): sorted runs, each more than
    twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Take in hashes (n,); which of them (n,) came for the first time."""
        is_new = np.zeros(len(hashes), np.bool_)
        is_new[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            is_new &= run[at] != hashes
        if is_new.any():
            self._runs.append(np.sort(hashes[is_new]))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return is_new
