"""Presets: the settings for one model as data, with their provenance."""
