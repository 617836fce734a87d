"""A trained model for others: its card, and its way to the hub.

card.py writes README.md from what stands in `training_metadata.json` and `results.json`; origin.py finds what a model
was trained from, and under which license; push.py uploads a model folder.
"""

from vlm.sharing.card import model_card
from vlm.sharing.origin import origin_of
from vlm.sharing.push import check_push, push_model

__all__ = ["check_push", "model_card", "origin_of", "push_model"]
