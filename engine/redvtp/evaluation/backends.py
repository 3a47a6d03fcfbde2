"""A backend answers a round of questions, several at a time, and hands each answer over as it comes.

The embedded engine is here, a running server in `server.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from redvtp.errors import spelled
from redvtp.evaluation.grid import Question

if TYPE_CHECKING:
    from redvtp.local import Generation, LocalEngine, Request


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what it took.

    tokens: emitted, an end token or stop string included.
    latency_s: from the request to the whole answer.
    visual_tokens, visual_tokens_kept: before and after pruning.
    kv_blocks: allocated when the request is admitted.
    kv_blocks_freed: freed before its end.
    error: why the question could not be asked; the other fields then mean nothing.
    """

    text: str = ""
    tokens: int = 0
    steps: int = 0
    latency_s: float = 0.0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    kv_blocks: int = 0
    kv_blocks_freed: int = 0
    error: str | None = None


Take = Callable[[Question, Answer], None]


class Backend(Protocol):
    """Answers the questions of one cell."""

    def answer(self, questions: Sequence[Question], take: Take) -> None:
        """In any order; calls `take` once for each question as it is answered.

        A question that the model cannot be asked gets an answer with `error`. Raises BadInput when no question can be
        asked any more, for example because a server is gone. An exception or interrupt loses only unfinished answers.
        """


class EmbeddedBackend:
    """`LocalEngine`, with its `max_num_seqs` questions at a time.

    spell: writes knobs in errors, see `redvtp.errors`.
    """

    def __init__(self, engine: LocalEngine, spell: Callable[[str], str] = str) -> None:
        self._engine = engine
        self._spell = spell

    def answer(self, questions: Sequence[Question], take: Take) -> None:
        taken: list[Question] = []

        def requests() -> Iterator[Request]:
            for question in questions:
                try:
                    request = request_of(question, self._engine)
                except ValueError as error:
                    take(question, Answer(error=spelled(error, self._spell)))
                    continue
                taken.append(question)
                yield request

        for number, generation in self._engine.stream(requests()):
            take(taken[number], _answer(generation))


def request_of(question: Question, engine: LocalEngine) -> Request:
    """The question for an embedded engine. Raises ValueError when it cannot serve it."""
    from redvtp.local import Request
    from redvtp.prompt import chat_prompt
    from redvtp.vision.images import open_image

    images = tuple(open_image(path) for path in question.task.images)
    prompt = chat_prompt(engine.tokenizer, question.task.question, len(images), template=engine.config.family.template)
    request = Request(prompt, images, question.denoising, question.pruning)
    engine.tokenize(request)
    return request


def _answer(generation: Generation) -> Answer:
    first = generation.steps[0]
    prunings = [step.pruning for step in generation.steps if step.pruning is not None]
    return Answer(
        text=generation.text,
        tokens=sum(len(step.new_tokens) for step in generation.steps),
        steps=len(generation.steps),
        latency_s=generation.seconds,
        visual_tokens=generation.visual_tokens,
        visual_tokens_kept=prunings[-1].visual_after if prunings else generation.visual_tokens,
        kv_blocks=first.kv_blocks + first.blocks_freed,
        kv_blocks_freed=sum(step.blocks_freed for step in generation.steps),
    )
