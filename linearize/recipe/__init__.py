"""Recipes: what decides how a model is converted, recovered and measured."""
