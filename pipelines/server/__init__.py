"""`dspark serve`: OpenAI-compatible answers from a published pair, decoded by our own batch engine.

`command` reads the options, `running` is the process from start to drain, `app` speaks HTTP, `schemas` says what may be
asked, `service` admits requests and follows them, `answers` makes text of their tokens, `engine_loop` is the one thread
that decodes, and `versions` loads pairs and notices new ones. None of it changes what the engine computes.
"""
