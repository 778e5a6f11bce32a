"""A token that ordinary text never holds: what a block drafter can show its network in the place of tokens to come.

Engines keep no vector of its own for a mask; they read a row of the embedding by a token id.
"""

from transformers import PreTrainedTokenizerBase


def unused_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """Id of an embedding row that no prompt and no answer is made of.

    The first row beyond the tokenizer's own tokens, which many families leave to pad their tables; else the last
    special token that neither ends nor pads nor starts a text and is not in the chat template; None if there is none.

    Args:
        tokenizer: of the target.
        vocab_size: rows of the target's embedding.
    """
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template or "")
    spare = [
        int(token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id not in named and token.content not in template and token_id < vocab_size
    ]
    return max(spare, default=None)
