"""Recipes: stages of commands from data to an exported model, run in order and only where something has changed."""
