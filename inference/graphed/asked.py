"""Whether captured rounds are wanted, in the words of configurations and the command line; imports no torch."""

CAPTURED_AUTO, CAPTURED_ON, CAPTURED_OFF = "auto", "on", "off"
"""On a GPU where they can be; wherever they can be, and refuse what cannot; nowhere."""
CAPTURED = (CAPTURED_AUTO, CAPTURED_ON, CAPTURED_OFF)
CAPTURED_COMPILED = "compiled"
"""As on, with the kernels of a round fused first, which takes a minute for each kind of round."""
PAIR_CAPTURED = (*CAPTURED, CAPTURED_COMPILED)
