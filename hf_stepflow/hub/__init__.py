"""Repositories on the Hub: their files, their cards, and their upload."""
