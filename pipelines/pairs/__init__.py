"""What can be done with published pairs: look, compare, check, clear away, hand on. It makes no pair itself."""
