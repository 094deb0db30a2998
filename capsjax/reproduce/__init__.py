"""Reproduces published tables: recipes, seeds trained together, results."""

from capsjax.reproduce.recipes import TABLES, Recipe
from capsjax.reproduce.results import RowResult
from capsjax.reproduce.tables import ReproduceConfig, reproduce

__all__ = ["TABLES", "Recipe", "ReproduceConfig", "RowResult", "reproduce"]
