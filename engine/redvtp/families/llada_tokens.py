"""Building block: the special tokens of LLaDA's tokenizers, found by their text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from redvtp.prompt import BOS, END_HEADER, EOS, EOT, MASK, PLACEHOLDER, START_HEADER, SpecialTokens


def find_llada_tokens(tokenizer: PreTrainedTokenizerBase, family: str, suppressed: tuple[str, ...]) -> SpecialTokens:
    """suppressed: texts of tokens, see `SamplerTraits`. Raises ValueError naming what the tokenizer lacks."""
    vocab = tokenizer.get_vocab()
    wanted = (BOS, EOS, EOT, MASK, START_HEADER, END_HEADER, PLACEHOLDER)
    missing = [text for text in wanted if text not in vocab]
    if missing:
        raise ValueError(f"the tokenizer lacks {len(missing)} special tokens of {family}: {', '.join(missing)}")
    return SpecialTokens(
        mask_id=vocab[MASK],
        end_ids=(vocab[EOS], vocab[EOT]),
        placeholder_id=vocab[PLACEHOLDER],
        suppressed=tuple(vocab[text] for text in suppressed),
        vocab=len(tokenizer),
    )
