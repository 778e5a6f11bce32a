"""What several GPUs of one host give in decoding and in writing a corpus, measured against one of them.

    python -m pipelines.spreading --processes 2

All of it happens within one run under torchrun: the first process holds a whole target beside its part of the spread
one, so that both decode the same requests in turns, in shuffled order, while the machine is the same. Three parts:

- `passes`: single requests, target-only and with prompt look-up: tokens, seconds a round, and what goes to talking;
- `batch`: the batch engine at several loads: tokens, tokens/s;
- `corpus`: the shards of a corpus, by one process and shared out: bytes, the target's tokens/s.

Where no model folder is given, the first two write one with random weights (seeded) in a shape whose heads can be
shared out. Its times are those of a trained model of that shape; its texts mean nothing, and prompt look-up finds more
in them than in a user's. How training scales is `pipelines.scaling`.
"""
