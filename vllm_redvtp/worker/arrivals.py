"""From vLLM's NewRequestData to the engine's Sequence: images through the tower, the prompt embedded, the plan made."""

from __future__ import annotations

import operator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData

from redvtp.denoising.ranks import Ranks
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.models.dvlm import Dvlm
from redvtp.models.visual_cache import ImageEncoder
from redvtp.vision.media import MediaItem
from vllm_redvtp.planning import RequestPlanner, visual_spans
from vllm_redvtp.worker.failures import OF_ANOTHER_RANK, failure_message, raise_if_of_device

logger = init_logger("vllm.redvtp.arrivals")


class Arrivals:
    """Makes sequences for a runner. What fails costs only the request it concerns, on every rank."""

    def __init__(
        self, model: Dvlm, encoder: ImageEncoder, planner: RequestPlanner, engine: DenoisingRunner, ranks: Ranks
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._planner = planner
        self._engine = engine
        self._ranks = ranks

    def add(self, requests: list[NewRequestData]) -> tuple[dict[str, Sequence], dict[str, str]]:
        """(sequences, errors), by request id. The vision tower takes the images of all requests together."""
        if not requests:
            return {}, {}
        sequences: dict[str, Sequence] = {}
        errors: dict[str, str] = {}
        for request, visual in zip(requests, self._encode(requests), strict=True):
            message = visual if isinstance(visual, str) else None
            if not isinstance(visual, str):
                try:
                    sequences[request.req_id] = self._sequence(request, visual)
                except Exception as error:
                    message = failure_message(request.req_id, error)
            if self._ranks.any_failed(message is not None):
                sequences.pop(request.req_id, None)
                errors[request.req_id] = message or OF_ANOTHER_RANK
        return sequences, errors

    def _encode(self, requests: list[NewRequestData]) -> list[list[Tensor] | str]:
        """For each request [visual, hidden] of each of its images, or why that failed."""
        message = None
        try:
            visual = iter(self._encoder.encode([item for each in requests for item in self.items(each)]))
            found: list[list[Tensor] | str] = [list(islice(visual, len(each.mm_features))) for each in requests]
        except Exception as error:
            raise_if_of_device(error)
            message = failure_message(requests[0].req_id, error) if len(requests) == 1 else str(error)
        if not self._ranks.any_failed(message is not None):
            return found
        if len(requests) == 1:
            return [message or OF_ANOTHER_RANK]
        logger.warning(
            "encoding images of %d requests failed (%s); retrying one by one to find the failing request",
            len(requests),
            message or OF_ANOTHER_RANK,
        )
        return [visual for each in requests for visual in self._encode([each])]

    def items(self, request: NewRequestData) -> list[MediaItem]:
        """The request's images as the encoder takes them."""
        images: list[dict[str, Any]] = [
            feature.data.get_data() for feature in request.mm_features if feature.data is not None
        ]
        treatments = self._model.config.vision.treatments(["image"] * len(images))
        return [
            MediaItem(
                "image",
                bytes(image["image_digest"].tolist()),
                tuple(image["image_sizes"].tolist()),
                treatment,
                partial(operator.itemgetter("pixel_values"), image),
            )
            for image, treatment in zip(images, treatments, strict=True)
        ]

    def _sequence(self, request: NewRequestData, visual: list[Tensor]) -> Sequence:
        """The engine's view of an arriving request with these visual tokens, [visual, hidden] for each image."""
        prompt, sampling = request.prompt_token_ids, request.sampling_params
        # The scheduler refuses requests without them.
        assert prompt is not None
        assert sampling is not None
        spans = visual_spans(request.mm_features)
        lengths = tuple(end - start for start, end in spans)
        served = self._planner.plan(sampling, len(prompt), lengths, request.req_id)
        plan = served.plan
        sequence = Sequence(
            request.req_id,
            self._model.embed_prompt(torch.tensor(prompt, device=self._model.device), spans, visual),
            spans,
            plan.denoising,
            plan.policy,
            self._planner.special,
            self._model.config.family.sampler.shifted_logits,
            stop_ids=plan.stop_ids,
            suffix_ids=plan.suffix_ids,
            block_table=list(request.block_ids[0]),
            draft_ids=plan.draft_ids,
            report_canvas=served.report == "full",
        )
        self._engine.prune_before(sequence)
        return sequence
