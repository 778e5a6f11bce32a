"""The report of a published version: one HTML file that needs nothing besides itself, and its figures as pictures."""
