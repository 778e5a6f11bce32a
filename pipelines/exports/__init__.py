"""Drafts in the formats that serving engines load, and the gate that reads them back.

`layouts/` has a module for every format: what it writes, and how it is read by the meaning its engines give to names
and keys. `write` makes a version's `serve/` folder, `parity` compares what lies there with the draft it was made from.
Which engines have really served a format, and how well, is in docs/serving.md.
"""
