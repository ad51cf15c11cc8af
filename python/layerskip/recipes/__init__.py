"""Recipes that turn existing models into LayerSkip models, and what came out of them."""
