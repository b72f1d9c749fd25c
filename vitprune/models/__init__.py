"""Create, load, validate, save and export models."""

from vitprune.models.io import create, load, save
from vitprune.models.validation import WEIGHTS
from vitprune.models.weights import read_weights, write_weights

__all__ = ["WEIGHTS", "create", "load", "read_weights", "save", "write_weights"]
