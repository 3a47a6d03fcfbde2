"""From a question to prompt tokens: the chat templates, the split at `<image>` marks, and where visual tokens stand.

The engine, the command and the vLLM processor all build prompts here, so a prompt is the same tokens whichever way it
comes in.
A mark is text, never a token: the prompt is split at it, the pieces are tokenised one by one, and as many placeholder
ids as the image will have visual tokens are put between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from redvtp.checkpoint.config import DvlmConfig

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


IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
# The same for checkpoints of the Qwen kind; tokenizers of tiny test checkpoints may have the other one instead.
IMAGE_PAD = "<|image_pad|>"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a meaning for denoising.

    end_ids: tokens that end an answer unless a request ignores them. suppressed: ids never chosen at a masked position.
    placeholder_id: marks slots that visual embeddings fill. vocab: len(tokenizer); larger ids have weights but no
    token.
    """

    mask_id: int
    end_ids: tuple[int, ...]
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

    @property
    def images(self) -> tuple[int, ...]:
        """Visual tokens of each image."""
        return tuple(end - start for start, end in self.visual_spans)


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


def special_tokens(tokenizer: PreTrainedTokenizerBase, config: DvlmConfig) -> SpecialTokens:
    """By their text in a LLaDA tokenizer, by `config.json` for Dream. Raises ValueError naming what is missing."""
    vocab = tokenizer.get_vocab()
    find = _dream_tokens if config.family.template == "chatml" else _llada_tokens
    return find(vocab, config, len(tokenizer))


def _llada_tokens(vocab: Mapping[str, int], config: DvlmConfig, size: int) -> SpecialTokens:
    wanted = (BOS, EOS, EOT, MASK, START_HEADER, END_HEADER, PLACEHOLDER)
    missing = [text for text in wanted if text not in vocab]
    if missing:
        raise ValueError(
            f"the tokenizer lacks {len(missing)} special tokens of {config.family.name}: {', '.join(missing)}"
        )
    # The mask and <|eot_id|> are left out on purpose: the reference lets the model choose them.
    suppressed = (BOS, EOS, START_HEADER, END_HEADER) if config.family.suppresses else ()
    return SpecialTokens(
        mask_id=vocab[MASK],
        end_ids=(vocab[EOS], vocab[EOT]),
        placeholder_id=vocab[PLACEHOLDER],
        suppressed=tuple(vocab[text] for text in suppressed),
        vocab=size,
    )


def _dream_tokens(vocab: Mapping[str, int], config: DvlmConfig, size: int) -> SpecialTokens:
    def known(key: str, token: int | None) -> int:
        if token is None or not 0 <= token < size:
            raise ValueError(f"config.json must have a {key} that the tokenizer has (of {size} tokens), got {token!r}")
        return token

    placeholders = [vocab[text] for text in (IMAGE_PAD, PLACEHOLDER) if text in vocab]
    if not placeholders:
        raise ValueError(f"the tokenizer has neither {IMAGE_PAD} nor {PLACEHOLDER}, to stand where visual tokens go")
    return SpecialTokens(
        mask_id=known("mask_token_id", config.mask_token_id),
        end_ids=(known("eos_token_id", config.eos_token_id), *(vocab[text] for text in (IM_END,) if text in vocab)),
        placeholder_id=placeholders[0],
        suppressed=(),
        vocab=size,
    )


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    num_images: int,
    system: str | None = DEFAULT_SYSTEM,
    template: str = "llada",
) -> str:
    """One user turn, images first; `system` None leaves the system turn out. template: the family's, see `Family`."""
    marks = " ".join([IMAGE_MARK] * num_images)
    user = f"{marks}\n{question}" if num_images else question
    turns = [("system", system)] if system is not None else []
    turns.append(("user", user))
    if template == "chatml":
        text = "".join(f"{IM_START}{role}\n{content.strip()}{IM_END}\n" for role, content in turns)
        return f"{text}{IM_START}assistant\n"
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
