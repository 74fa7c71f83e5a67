"""Repositories on the Hub: their cards, their files, and how they get there."""
