"""LocalEngine: the embedded way to run a checkpoint, without a server and without vLLM.

A free list of blocks, a first-come-first-served queue, and `DenoisingRunner`. It stays small on purpose: serving is
vLLM's task.

    engine = LocalEngine("path/to/checkpoint")
    prompt = chat_prompt(engine.tokenizer, "What is shown?", num_images=1)
    (answer,) = engine.generate([Request(prompt, (open_image("photo.jpg"),))])
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from redvtp.attention.embedded import AUTO, check_attention, embedded_attention, preferred_block_size
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.device import configure_torch, named_device
from redvtp.errors import InvalidRequest, Knob
from redvtp.families.config import DvlmConfig, load_config
from redvtp.kv.blocks import BlockPool, blocks_needed
from redvtp.local_cache import embedded_cache
from redvtp.local_queue import HeldBlocks, Running, Waiting
from redvtp.models.dvlm import Dvlm
from redvtp.models.loading import checkpoint_weights, load_weights
from redvtp.models.visual_cache import DEFAULT_CACHE_BYTES, ImageEncoder
from redvtp.planning import RequestPlan, plan_request
from redvtp.prompt import PromptTokens, build_prompt_tokens, split_prompt
from redvtp.request import Generation as Generation
from redvtp.request import Request as Request

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LocalEngine:
    """One checkpoint, ready to generate.

    model: checkpoint folder.
    dtype: float32, bfloat16, float16 or auto (the checkpoint's).
    device: cpu, cuda or cuda:N; None for a GPU if there is one.
    block_size: tokens in a cache block; None for what suits the device's attention.
    attention: torch, xformers (on CUDA), or auto, see `redvtp.attention.embedded`.
    num_blocks: cache blocks in all. kv_cache_memory_bytes: as many blocks as fit in so much memory. With neither of
    them the cache holds max_num_seqs of the longest requests, within 4 GiB.
    max_model_len: longest prompt + canvas + suffix.
    max_num_seqs: most requests in a batch.
    vision_cache_bytes: visual tokens remembered for images that come again, 0 for none.
    config_overrides: config.json keys to replace, such as {"image_aspect_ratio": "pad"}.

    Raises ValueError for a checkpoint that is incomplete or of another architecture, and for a device that is missing.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str | None = None,
        block_size: int | None = None,
        attention: str = AUTO,
        num_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        vision_cache_bytes: int = DEFAULT_CACHE_BYTES,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        check_attention(attention)
        self.config: DvlmConfig = load_config(model, config_overrides)
        self.device = named_device(device)
        configure_torch(exact_products=True)
        self.dtype = _torch_dtype(self.config.torch_dtype if dtype == "auto" else dtype)
        self.tokenizer = self.config.family.load_tokenizer(model)
        self.special = self.config.special_tokens(self.tokenizer)
        self.model = _load_model(Path(model), self.config, self.dtype, self.device)
        self.images = ImageEncoder(self.model, vision_cache_bytes)
        self.max_model_len = max_model_len or self.config.max_length
        self.max_num_seqs = max_num_seqs
        if block_size is None:
            block_size = preferred_block_size(self.device)
        longest = (self.max_model_len, max_num_seqs)
        sizes = (block_size, longest, num_blocks, kv_cache_memory_bytes)
        self.cache = embedded_cache(self.config, self.dtype, self.device, *sizes)
        self.blocks = BlockPool(self.cache.num_blocks)
        self._held = HeldBlocks(self.blocks)
        backend = embedded_attention(attention, self.cache, self.config.head_dim**-0.5)
        self.runner = DenoisingRunner(self.model, self.cache, self.special, attention=backend)

    def generate(self, requests: list[Request], progress: bool = False) -> list[Generation]:
        """Answer every request, in order. Raises ValueError before any computing if one of them cannot be served."""
        waiting = [self._prepare(number, request) for number, request in enumerate(requests)]
        steps = sum(entry.plan.denoising.resolved_steps for entry in waiting)
        # leave=None: below a caller's own bar it goes when it is done.
        with tqdm(total=steps, desc="denoising", unit="step", disable=not progress, leave=None) as bar:
            for stepped, finished in self._run(iter(waiting)):
                bar.update(stepped)
                for entry in finished:
                    # A stop, or a canvas block that filled early, leaves steps out.
                    bar.update(entry.generation.request.denoising.resolved_steps - len(entry.generation.steps))
        return [entry.generation for entry in waiting]

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[int, Generation]]:
        """Answer requests as they come: (number of the request, answer) for each as it ends, in any order.

        A request is taken only when there is room for it in the batch, so thousands need not be in memory at once.
        Raises ValueError when the turn of a request comes that cannot be served; `tokenize` finds out beforehand.
        """
        for _, finished in self._run(self._prepare(number, request) for number, request in enumerate(requests)):
            for entry in finished:
                yield int(entry.sequence.request_id), entry.generation

    def tokenize(self, request: Request) -> PromptTokens:
        """The prompt as tokens. Raises ValueError when it cannot be served: marks, image sizes, pruning, length."""
        return self._plan(request)[0]

    @torch.inference_mode()
    def sequence(
        self, request: Request, prompt: PromptTokens, block_table: list[int], request_id: str = ""
    ) -> Sequence:
        """A sequence ready for its first step; runs the vision tower over images it has not seen."""
        visual = self.images.encode(self.config.vision.items(request.images))
        return self._sequence(request_id, prompt, self._plan_of(request, prompt), visual, block_table)

    def _plan(self, request: Request) -> tuple[PromptTokens, RequestPlan]:
        counts = self.config.vision.counts([image.size for image in request.images])
        pieces = split_prompt(self.tokenizer, request.prompt, len(request.images), self.config.family.template)
        prompt = build_prompt_tokens(pieces, counts, self.special.placeholder_id)
        if not prompt.ids:
            raise InvalidRequest("the prompt is empty; give the model at least one token")
        plan = self._plan_of(request, prompt)
        if blocks_needed(plan.kv_tokens, self.cache.block_size) > self.cache.num_blocks:
            raise InvalidRequest(
                "prompt plus ",
                Knob("gen_length"),
                f" needs {plan.kv_tokens:,} tokens of KV cache, which has "
                f"{self.cache.num_blocks * self.cache.block_size:,}; give the engine more blocks (",
                Knob("kv_cache_memory_bytes"),
                ")",
            )
        return prompt, plan

    def _plan_of(self, request: Request, prompt: PromptTokens) -> RequestPlan:
        return plan_request(
            self.tokenizer,
            request.denoising,
            request.pruning,
            mask_id=self.special.mask_id,
            num_layers=self.config.num_hidden_layers,
            prompt_tokens=len(prompt.ids),
            group_lengths=prompt.images,
            max_model_len=self.max_model_len,
        )

    def _prepare(self, number: int, request: Request) -> Waiting:
        prompt, plan = self._plan(request)
        request = replace(request, denoising=plan.denoising)
        return Waiting(number, Generation(request, plan.prompt_tokens, prompt.visual_spans), prompt, plan)

    def _sequence(
        self, request_id: str, prompt: PromptTokens, plan: RequestPlan, visual: list[Tensor], block_table: list[int]
    ) -> Sequence:
        ids = torch.tensor(prompt.ids, device=self.device)
        sequence = Sequence(
            request_id,
            self.model.embed_prompt(ids, prompt.visual_spans, visual),
            prompt.visual_spans,
            plan.denoising,
            plan.policy,
            self.special,
            self.config.family.sampler.shifted_logits,
            stop_ids=plan.stop_ids,
            suffix_ids=plan.suffix_ids,
            block_table=block_table,
            draft_ids=plan.draft_ids,
        )
        self.runner.prune_before(sequence)
        return sequence

    def _run(self, requests: Iterator[Waiting]) -> Iterator[tuple[int, list[Running]]]:
        """Step until all are answered; after each step, how many sequences it took on and which of them ended."""
        waiting: deque[Waiting] = deque()
        running: list[Running] = []
        with self._held.of_a_call():
            try:
                while True:
                    waiting.extend(islice(requests, max(0, self.max_num_seqs - len(running) - len(waiting))))
                    self._admit(waiting, running)
                    if not running:
                        break
                    self._step(running)
                    finished = [entry for entry in running if entry.sequence.finished]
                    stepped = len(running)
                    for entry in finished:
                        running.remove(entry)
                        self._finish(entry)
                    yield stepped, finished
            finally:
                for entry in running:
                    self._held.give_back(entry.blocks)
            if waiting:
                needed = blocks_needed(waiting[0].plan.kv_tokens, self.cache.block_size)
                raise RuntimeError(
                    f"request {waiting[0].number} needs {needed} KV cache blocks and {self.blocks.num_free} of "
                    f"{self.cache.num_blocks} are free; finish or close the other streams of this engine first"
                )

    @torch.inference_mode()
    def _admit(self, waiting: deque[Waiting], running: list[Running]) -> None:
        """First come, first served, while there are blocks. An error gives all blocks back that were taken here."""
        taken: list[list[int]] = []
        for entry in islice(waiting, self.max_num_seqs - len(running)):
            blocks = self._held.take(blocks_needed(entry.plan.kv_tokens, self.cache.block_size))
            if blocks is None:
                break
            taken.append(blocks)
        admitted = [waiting.popleft() for _ in taken]
        started = time.perf_counter()
        try:
            # The tower takes the images of all of them together.
            vision = self.config.vision
            items = [item for entry in admitted for item in vision.items(entry.generation.request.images)]
            visual = iter(self.images.encode(items))
            sequences = []
            for entry, blocks in zip(admitted, taken, strict=True):
                own = list(islice(visual, len(entry.plan.group_lengths)))
                sequences.append(self._sequence(str(entry.number), entry.prompt, entry.plan, own, list(blocks)))
        except BaseException:
            for blocks in taken:
                self._held.give_back(blocks)
            raise
        for entry, blocks, sequence in zip(admitted, taken, sequences, strict=True):
            running.append(Running(sequence, entry.generation, blocks, started))

    def _step(self, running: list[Running]) -> None:
        started = time.perf_counter()
        reports = self.runner.step([entry.sequence for entry in running])
        elapsed = (time.perf_counter() - started) * 1e3
        for entry, report in zip(running, reports, strict=True):
            entry.generation.steps.append(report)
            entry.generation.step_ms.append(elapsed)
            kept = len(entry.sequence.block_table)
            self._held.give_back(entry.blocks[kept:])
            del entry.blocks[kept:]

    def _finish(self, entry: Running) -> None:
        self._held.give_back(entry.blocks)
        generation = entry.generation
        generation.output_ids = entry.sequence.output_ids
        generation.text = str(self.tokenizer.decode(generation.output_ids, skip_special_tokens=True))
        generation.finish_reason = entry.sequence.finish_reason or ""
        generation.seconds = time.perf_counter() - entry.admitted


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
