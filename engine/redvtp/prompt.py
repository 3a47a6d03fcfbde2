"""From a question to prompt tokens: the LLaDA-V template, the split at `<image>` marks, and where visual tokens stand.

The engine, the command and the vLLM processor all build prompts here, so a prompt is the same tokens whichever way it
comes in.
A mark is text, never a token: the prompt is split at it, the pieces are tokenised one by one, and as many placeholder
ids as the image will have visual tokens are put between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_MARK = "<image>"
DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
EOT = "<|eot_id|>"
MASK = "<|mdm_mask|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
# A reserved token no prompt and no answer uses; it only marks slots that visual embeddings fill.
PLACEHOLDER = "<|reserved_token_0|>"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a meaning for denoising, found by their text so any LLaDA tokenizer works.

    suppressed: ids never chosen at a masked position. vocab: len(tokenizer); larger ids have weights but no token.
    """

    mask_id: int
    bos_id: int
    eos_id: int
    eot_id: int
    placeholder_id: int
    suppressed: tuple[int, ...]
    vocab: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the engine takes it.

    ids: with the placeholder id at every visual token. visual_spans: half-open, one per image, in token positions.
    """

    ids: tuple[int, ...]
    visual_spans: tuple[tuple[int, int], ...]


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; only local files are read."""
    path = Path(model_dir)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json")
    # Not AutoTokenizer: it looks the model type up, which transformers does not know, and may run the checkpoint's
    # code.
    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        # The tokenizers library has no error class of its own.
        raise ValueError(f"the tokenizer in {path} cannot be read: {error}") from error
    return tokenizer


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Looks LLaDA's special tokens up. Raises ValueError naming those the tokenizer does not have as single tokens."""
    vocab = tokenizer.get_vocab()
    wanted = (BOS, EOS, EOT, MASK, START_HEADER, END_HEADER, PLACEHOLDER)
    missing = [text for text in wanted if text not in vocab]
    if missing:
        raise ValueError(f"the tokenizer lacks {len(missing)} special tokens of LLaDA-V: {', '.join(missing)}")
    return SpecialTokens(
        mask_id=vocab[MASK],
        bos_id=vocab[BOS],
        eos_id=vocab[EOS],
        eot_id=vocab[EOT],
        placeholder_id=vocab[PLACEHOLDER],
        # The mask and <|eot_id|> are left out on purpose: the reference lets the model choose them.
        suppressed=tuple(vocab[text] for text in (BOS, EOS, START_HEADER, END_HEADER)),
        vocab=len(tokenizer),
    )


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, num_images: int, system: str | None = DEFAULT_SYSTEM
) -> str:
    """One user turn in the LLaDA-V template, images first; `system` None leaves the system turn out."""
    marks = " ".join([IMAGE_MARK] * num_images)
    user = f"{marks}\n{question}" if num_images else question
    turns = [("system", system)] if system is not None else []
    turns.append(("user", user))
    text = "".join(f"{START_HEADER}{role}{END_HEADER}\n\n{content.strip()}{EOT}" for role, content in turns)
    return f"{tokenizer.bos_token or BOS}{text}{START_HEADER}assistant{END_HEADER}\n\n"


def split_prompt(tokenizer: PreTrainedTokenizerBase, text: str, num_images: int) -> list[list[int]]:
    """Ids of the pieces between image marks, `num_images` + 1 of them.

    Like the reference, every piece after a mark loses its first token when the prompt begins with bos. The model never
    sees the newline after `<image>`; text put straight after a mark loses a real token, so keep the template's newline.
    """
    parts = text.split(IMAGE_MARK)
    if len(parts) - 1 != num_images:
        marks = len(parts) - 1
        raise ValueError(
            f"the prompt has {marks} {IMAGE_MARK} mark{'' if marks == 1 else 's'} "
            f"but {num_images} image{' was' if num_images == 1 else 's were'} given"
        )
    pieces: list[list[int]] = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
    bos = tokenizer.convert_tokens_to_ids(BOS)
    drop = 1 if pieces[0][:1] == [bos] else 0
    return [pieces[0], *(piece[drop:] for piece in pieces[1:])]


def build_prompt_tokens(
    pieces: Sequence[Sequence[int]], visual_counts: Sequence[int], placeholder_id: int
) -> PromptTokens:
    """Joins the pieces with `visual_counts[i]` placeholders after piece i."""
    if len(pieces) != len(visual_counts) + 1:
        raise ValueError(f"{len(pieces)} prompt pieces do not surround {len(visual_counts)} images")
    ids = list(pieces[0])
    spans = []
    for count, piece in zip(visual_counts, pieces[1:], strict=True):
        spans.append((len(ids), len(ids) + count))
        ids.extend(chain([placeholder_id] * count, piece))
    return PromptTokens(ids=tuple(ids), visual_spans=tuple(spans))
