"""The stages and their order: corpus, build, score, select, publish; artifacts, registry and the command line."""
