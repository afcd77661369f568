"""How sure a measured figure is: 95% intervals of means, of shares, and of anything else."""

from collections.abc import Callable

import numpy as np


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """The middle 95% of bootstrapped means."""
    draws = np.random.default_rng(seed).integers(0, len(values), (1000, len(values)))
    return np.quantile(values[draws].mean(-1), (0.025, 0.975)).tolist()


def wilson(right: float, count: int, z: float = 1.96) -> list[float]:
    """Wilson's 95% interval of a share."""
    middle, half = right + z * z / 2, z * (right * (count - right) / count + z * z / 4) ** 0.5
    return [(middle - half) / (count + z * z), (middle + half) / (count + z * z)]


def again(measure: Callable[[list], float], items: list, draws: int = 1000) -> list[float]:
    """The middle 95% of a measure over items that are drawn with replacement."""
    rng = np.random.default_rng(0)
    values = [measure([items[i] for i in rng.integers(0, len(items), len(items))]) for _ in range(draws)]
    return np.quantile(values, (0.025, 0.975)).tolist()
