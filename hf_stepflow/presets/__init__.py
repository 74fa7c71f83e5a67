"""Presets: settings for a model as data, with where they come from."""
