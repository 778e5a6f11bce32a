"""Drift of published pairs: what has changed, and since when."""
