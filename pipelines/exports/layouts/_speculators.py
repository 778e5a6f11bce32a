"""The part of a speculators configuration that does not depend on the kind of draft."""

from typing import Any

from pipelines.exports.source import Source

VERSION = "0.5.0"
"""Of the format, as its readers note it; they do not act on it."""


def speculators_config(source: Source, algorithm: str, *, architecture: str) -> dict[str, Any]:
    """Architecture, algorithm, target, and how many tokens are proposed."""
    return {
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": source.tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": source.verifier,
                "architectures": list(source.target.model.config.architectures or []),
            },
        },
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
