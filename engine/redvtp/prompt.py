"""From a question to prompt tokens: the chat template, the split at `<image>` marks, and where visual tokens stand.

The engine, the command and the vLLM processor all build prompts here, so all of them get the same tokens. A mark is
text, never a token: the prompt is split at it, the pieces are tokenised one by one, and as many placeholder ids as the
image will have visual tokens are put between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_MARK = "<image>"
# Both templates have it too; training asks for it by this name.
DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# Special tokens of LLaDA's tokenizers.
BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
EOT = "<|eot_id|>"
MASK = "<|mdm_mask|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
# A reserved token that no prompt and no answer uses; it only marks slots that visual embeddings fill.
PLACEHOLDER = "<|reserved_token_0|>"


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation with images is written down.

    name: of the Jinja file in `redvtp/templates`. It gets the messages, and `default_system`: false leaves out the
        system message that it puts first where the conversation has none.
    between_images: text between the marks of two images.
    after_images: text between the last mark and the question.
    around_image: text before and after each mark, for the model's eyes only: no conversation contains it.
    drops_behind: text of a token. A prompt that begins with it loses the first token of each piece after a mark
        (reference: LLaVA's tokenizer_image_token). None: nothing is lost.
    """

    name: str
    between_images: str = " "
    after_images: str = "\n"
    around_image: tuple[str, str] = ("", "")
    drops_behind: str | None = None

    @property
    def path(self) -> Path:
        return Path(__file__).parent / "templates" / f"{self.name}.jinja"

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")


LLADA_CHAT = ChatTemplate("llada", drops_behind=BOS)
CHATML = ChatTemplate("chatml", drops_behind=BOS)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids with a meaning for denoising.

    mask_id: an undecided canvas position.
    end_ids: tokens that end an answer unless a request ignores them.
    placeholder_id: marks slots that visual embeddings fill.
    suppressed: ids never chosen at a masked position.
    vocab: len(tokenizer); larger ids have weights but no token.
    """

    mask_id: int
    end_ids: tuple[int, ...]
    placeholder_id: int
    suppressed: tuple[int, ...]
    vocab: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the engine takes it.

    ids: with the placeholder id at every visual token.
    visual_spans: half-open, one per image, in token positions.
    """

    ids: tuple[int, ...]
    visual_spans: tuple[tuple[int, int], ...]

    @property
    def images(self) -> tuple[int, ...]:
        """Visual tokens of each image."""
        return tuple(end - start for start, end in self.visual_spans)


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that has a tokenizer.json; only local files are read."""
    path = Path(model_dir)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} has no tokenizer.json")
    # Not AutoTokenizer: it looks the model type up, which transformers does not know, and may run the checkpoint's
    # code.
    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        # The tokenizers library has no error class.
        raise ValueError(f"the tokenizer in {path} cannot be read: {error}") from error
    return tokenizer


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    num_images: int,
    template: ChatTemplate = LLADA_CHAT,
    system: bool = True,
) -> str:
    """One user turn, images first. system: False leaves the template's system message out."""
    marks = template.between_images.join([IMAGE_MARK] * num_images)
    user = f"{marks}{template.after_images}{question}" if num_images else question
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}],
        chat_template=template.text,
        tokenize=False,
        add_generation_prompt=True,
        default_system=system,
    )
    return str(text)


def split_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, num_images: int, template: ChatTemplate = LLADA_CHAT
) -> list[list[int]]:
    """Ids of the pieces between image marks, `num_images` + 1 of them.

    What `ChatTemplate.drops_behind` drops is the newline that the template puts after `<image>`. Text put straight
    after a mark loses its first token, so keep the newline.
    """
    parts = text.split(IMAGE_MARK)
    if len(parts) - 1 != num_images:
        marks = len(parts) - 1
        raise ValueError(
            f"the prompt has {marks} {IMAGE_MARK} mark{'' if marks == 1 else 's'} "
            f"but {num_images} image{' was' if num_images == 1 else 's were'} given"
        )
    before, after = template.around_image
    parts = [
        f"{after if index else ''}{part}{before if index < num_images else ''}" for index, part in enumerate(parts)
    ]
    pieces: list[list[int]] = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
    first = None if template.drops_behind is None else tokenizer.convert_tokens_to_ids(template.drops_behind)
    drop = 1 if first is not None and pieces[0][:1] == [first] else 0
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
