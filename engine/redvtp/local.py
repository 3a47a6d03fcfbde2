"""LocalEngine: the embedded way to run a checkpoint, without a server and without vLLM.

A free list of blocks, a first-come-first-served queue, and `DenoisingRunner`. It stays small on purpose: serving is
vLLM's work.

    engine = LocalEngine("path/to/checkpoint")
    prompt = chat_prompt(engine.tokenizer, "What is shown?", num_images=1)
    (answer,) = engine.generate([Request(prompt, (open_image("photo.jpg"),))])
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from redvtp.canvas.draft import lay_out
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.families.config import DvlmConfig, load_config
from redvtp.kv.blocks import BlockPool, blocks_needed
from redvtp.kv.pages import PagedKVCache
from redvtp.models.dvlm import Dvlm
from redvtp.models.loading import checkpoint_weights, load_weights
from redvtp.models.visual_cache import DEFAULT_CACHE_BYTES, ImageEncoder
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import PromptTokens, build_prompt_tokens, split_prompt
from redvtp.pruning.policy import Policy
from redvtp.pruning.resolve import policy_for
from redvtp.reports import StepReport
from redvtp.vision.media import MediaItem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Without --num-blocks the cache holds max_num_seqs long sequences, but no more than this unless one sequence alone
# needs it.
CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Request:
    """prompt: the full templated text, with an `<image>` mark for each of `images` (PIL, RGB)."""

    prompt: str
    images: tuple[Image, ...] = ()
    denoising: DenoisingParams = field(default_factory=DenoisingParams)
    pruning: PruningParams = field(default_factory=PruningParams)


@dataclass
class Generation:
    """A finished request. steps and step_ms: one entry for each denoising step; step_ms is shared by the whole
    batch. seconds: from its admission to its end, with the vision tower and whatever else ran in between."""

    request: Request
    prompt_tokens: int
    visual_spans: tuple[tuple[int, int], ...]
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    steps: list[StepReport] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def visual_tokens(self) -> int:
        return sum(end - start for start, end in self.visual_spans)


@dataclass
class _Running:
    sequence: Sequence
    generation: Generation
    blocks: list[int]
    admitted: float


class LocalEngine:
    """One checkpoint, ready to generate.

    model: checkpoint folder. dtype: float32, bfloat16, float16 or auto (the checkpoint's). block_size: tokens in a
    cache block.
    num_blocks: cache blocks in all. max_model_len: longest prompt + canvas + suffix. vision_cache_bytes: visual tokens
    remembered for images that come again, 0 for none. config_overrides: config.json keys to replace, such as
    {"image_aspect_ratio": "pad"}.

    Raises ValueError for a checkpoint that is incomplete or of another architecture.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str | None = None,
        block_size: int = 32,
        num_blocks: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        vision_cache_bytes: int = DEFAULT_CACHE_BYTES,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.config: DvlmConfig = load_config(model, config_overrides)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = _torch_dtype(self.config.torch_dtype if dtype == "auto" else dtype)
        self.tokenizer = self.config.family.load_tokenizer(model)
        self.special = self.config.special_tokens(self.tokenizer)
        self.model = _load_model(Path(model), self.config, self.dtype, self.device)
        self.images = ImageEncoder(self.model, vision_cache_bytes)
        self.max_model_len = max_model_len or self.config.max_length
        self.max_num_seqs = max_num_seqs
        self.cache = self._make_cache(block_size, num_blocks)
        self.blocks = BlockPool(self.cache.num_blocks)
        self.runner = DenoisingRunner(self.model, self.cache, self.special)

    def generate(self, requests: list[Request], progress: bool = False) -> list[Generation]:
        """Answer every request, in order. Raises ValueError before any computing if one of them cannot be served."""
        waiting = [self._generation(request) for request in requests]
        steps = sum(request.denoising.resolved_steps for request in requests)
        # leave=None: below a caller's own bar it goes when it is done.
        with tqdm(total=steps, desc="denoising", unit="step", disable=not progress, leave=None) as bar:
            for stepped, finished in self._run(iter(waiting)):
                bar.update(stepped)
                for entry in finished:
                    # A stop, or a canvas block that filled early, leaves steps out.
                    bar.update(entry.generation.request.denoising.resolved_steps - len(entry.generation.steps))
        return [generation for generation, _ in waiting]

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[int, Generation]]:
        """Answer requests as they come: (number of the request, answer) for each as it ends, whatever its place.

        A request is taken only when there is room for it in the batch, so thousands need not be in memory at once.
        Raises ValueError when the turn of a request comes that cannot be served; `tokenize` tells beforehand.
        """
        for _, finished in self._run(map(self._generation, requests)):
            for entry in finished:
                yield int(entry.sequence.request_id), entry.generation

    def tokenize(self, request: Request) -> PromptTokens:
        """The prompt as tokens. Raises ValueError when it cannot be served: marks, image sizes, pruning, length."""
        counts = self.config.vision.counts([image.size for image in request.images])
        pieces = split_prompt(self.tokenizer, request.prompt, len(request.images), self.config.family.template)
        prompt = build_prompt_tokens(pieces, counts, self.special.placeholder_id)
        if not prompt.ids:
            raise ValueError("the prompt is empty; give the model at least one token")
        denoising, _ = self._lay_out(request)
        extra = denoising.gen_length + len(self._encode(denoising.suffix))
        if len(prompt.ids) + extra > self.max_model_len:
            raise ValueError(
                f"prompt ({len(prompt.ids):,} tokens, {sum(counts):,} of them visual) plus gen_length "
                f"{denoising.gen_length} exceeds max_model_len {self.max_model_len}; shorten gen_length or use "
                f"a smaller image"
            )
        held = self._kv_tokens(request, prompt)
        if blocks_needed(held, self.cache.block_size) > self.cache.num_blocks:
            raise ValueError(
                f"prompt plus gen_length needs {held:,} tokens of KV cache, which has "
                f"{self.cache.num_blocks * self.cache.block_size:,}; give the engine more blocks"
            )
        return prompt

    @torch.inference_mode()
    def sequence(
        self, request: Request, prompt: PromptTokens, block_table: list[int], request_id: str = ""
    ) -> Sequence:
        """A sequence ready for its first step; runs the vision tower over images it has not seen."""
        return self._sequence(request, prompt, block_table, request_id, self.images.encode(self._items(request)))

    def _items(self, request: Request) -> list[MediaItem]:
        return self.config.vision.items(request.images)

    def _sequence(
        self, request: Request, prompt: PromptTokens, block_table: list[int], request_id: str, visual: list[Tensor]
    ) -> Sequence:
        denoising, draft_ids = self._lay_out(request)
        ids = torch.tensor(prompt.ids, device=self.device)
        sequence = Sequence(
            request_id,
            self.model.embed_prompt(ids, prompt.visual_spans, visual),
            prompt.visual_spans,
            denoising,
            self._policy(request, prompt),
            self.special,
            self.config.family.sampler.shifted_logits,
            stop_ids=tuple(tuple(self._encode(stop)) for stop in denoising.stop),
            suffix_ids=tuple(self._encode(denoising.suffix)),
            block_table=block_table,
            draft_ids=draft_ids,
        )
        self.runner.prune_before(sequence)
        return sequence

    def _generation(self, request: Request) -> tuple[Generation, PromptTokens]:
        prompt = self.tokenize(request)
        request = replace(request, denoising=self._lay_out(request)[0])
        return Generation(request, len(prompt.ids), prompt.visual_spans), prompt

    def _run(self, requests: Iterator[tuple[Generation, PromptTokens]]) -> Iterator[tuple[int, list[_Running]]]:
        """Step until all are answered; after each step, how many sequences it took on and which of them ended."""
        waiting: deque[tuple[int, tuple[Generation, PromptTokens]]] = deque()
        running: list[_Running] = []
        numbered = enumerate(requests)
        try:
            while True:
                waiting.extend(islice(numbered, max(0, self.max_num_seqs - len(running) - len(waiting))))
                self._admit(waiting, running)
                if not running:
                    return
                self._step(running)
                finished = [entry for entry in running if entry.sequence.finished]
                stepped = len(running)
                for entry in finished:
                    running.remove(entry)
                    self._finish(entry)
                yield stepped, finished
        finally:
            for entry in running:
                self.blocks.free(entry.blocks)

    def _lay_out(self, request: Request) -> tuple[DenoisingParams, tuple[int, ...]]:
        return lay_out(self.tokenizer, request.denoising, self.special.mask_id)

    def _policy(self, request: Request, prompt: PromptTokens) -> Policy | None:
        denoising, _ = self._lay_out(request)
        layers = self.config.num_hidden_layers
        return policy_for(request.pruning, denoising, layers, len(prompt.ids), prompt.images)

    def _kv_tokens(self, request: Request, prompt: PromptTokens) -> int:
        """Tokens whose keys and values the cache must hold at first."""
        denoising, _ = self._lay_out(request)
        policy = self._policy(request, prompt)
        dropped = 0 if policy is None else sum(prompt.images) - policy.visual_at_first(prompt.images)
        return len(prompt.ids) - dropped + denoising.gen_length + len(self._encode(denoising.suffix))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    @torch.inference_mode()
    def _admit(self, waiting: deque[tuple[int, tuple[Generation, PromptTokens]]], running: list[_Running]) -> None:
        admitted: list[tuple[int, Generation, PromptTokens, list[int]]] = []
        while waiting and len(running) + len(admitted) < self.max_num_seqs:
            number, (generation, prompt) = waiting[0]
            held = self._kv_tokens(generation.request, prompt)
            blocks = self.blocks.allocate(blocks_needed(held, self.cache.block_size))
            if blocks is None:
                break
            waiting.popleft()
            admitted.append((number, generation, prompt, blocks))
        started = time.perf_counter()
        try:
            # The tower takes the images of all of them together.
            visual = iter(
                self.images.encode([image for _, entry, *_ in admitted for image in self._items(entry.request)])
            )
        except BaseException:
            for *_, blocks in admitted:
                self.blocks.free(blocks)
            raise
        for number, generation, prompt, blocks in admitted:
            request = generation.request
            own = list(islice(visual, len(request.images)))
            sequence = self._sequence(request, prompt, list(blocks), str(number), own)
            running.append(_Running(sequence, generation, blocks, started))

    def _step(self, running: list[_Running]) -> None:
        started = time.perf_counter()
        reports = self.runner.step([entry.sequence for entry in running])
        elapsed = (time.perf_counter() - started) * 1e3
        for entry, report in zip(running, reports, strict=True):
            entry.generation.steps.append(report)
            entry.generation.step_ms.append(elapsed)
            kept = len(entry.sequence.block_table)
            self.blocks.free(entry.blocks[kept:])
            del entry.blocks[kept:]

    def _finish(self, entry: _Running) -> None:
        self.blocks.free(entry.blocks)
        generation = entry.generation
        generation.output_ids = entry.sequence.output_ids
        generation.text = str(self.tokenizer.decode(generation.output_ids, skip_special_tokens=True))
        generation.finish_reason = entry.sequence.finish_reason or ""
        generation.seconds = time.perf_counter() - entry.admitted

    def _make_cache(self, block_size: int, num_blocks: int | None) -> PagedKVCache:
        config = self.config
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if num_blocks is None:
            one = blocks_needed(self.max_model_len, block_size)
            token_bytes = (
                2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.dtype.itemsize
            )
            num_blocks = max(one, min(one * self.max_num_seqs, CACHE_BYTES // (token_bytes * block_size)))
        return PagedKVCache(
            config.num_hidden_layers,
            num_blocks,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
            self.dtype,
            self.device,
        )


def _torch_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or auto, got {name!r}")
    return DTYPES[name]


def _load_model(path: Path, config: DvlmConfig, dtype: torch.dtype, device: torch.device) -> Dvlm:
    # On the meta device first: an 8B model must not be initialised with random numbers only to be overwritten.
    with torch.device("meta"):
        model = Dvlm(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, checkpoint_weights(path))
    return model.eval().requires_grad_(False)
