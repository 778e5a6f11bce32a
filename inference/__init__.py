"""How a draft is used and measured: target, drafters, speculative decoder, lookahead, device profile, statistics."""
