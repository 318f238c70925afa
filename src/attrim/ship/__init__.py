"""What leaves the house: saving, loading, sizes and measured latency."""

from attrim.ship.store import load, save
from attrim.ship.timing import Latency, compare_latency, latency
from attrim.ship.weights import file_size, load_weights, save_weights

__all__ = ["Latency", "compare_latency", "file_size", "latency", "load", "load_weights", "save", "save_weights"]
