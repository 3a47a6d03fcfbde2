"""What `roofline.py` predicts for cards of data sheets, as text. Nothing in these tables was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from machines import CARDS, Card, card_machine
from predict import Predictor, fits
from request_steps import CACHES, Asked, Step
from work import Code

from redvtp.evaluation.table import aligned
from redvtp.families.config import DvlmConfig

NAMES = frozenset({"card", "source"})


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be predicted.

    asked: the dense request without a cache.
    tiles: of its picture.
    weights: bytes of them.
    keep: percent of visual tokens kept; 100 is dense.
    batches: how many requests step together.
    gap, host: seconds, see `Machine`.
    """

    config: DvlmConfig
    asked: Asked
    tiles: int
    weights: int
    keep: Sequence[int]
    batches: Sequence[int]
    code: Code
    gap: float
    host: float

    def kept(self, percent: int, cache: str = "none") -> Asked:
        denoising = replace(self.asked.denoising, cache=cache)
        return replace(self.asked, denoising=denoising, keep=None if percent == 100 else percent / 100)

    def fits(self, card: Card, asked: Asked, batch: int) -> bool:
        return fits(self.config, self.weights, card, asked, batch, self.code.itemsize)

    def predictor(self, card: Card) -> Predictor:
        return Predictor(self.config, card_machine(card, self.gap, self.host), self.code, self.tiles)


def tables(question: Question, cards: Sequence[Card]) -> str:
    return "\n\n".join((_head(question), _step_table(question, cards), _request_table(question, cards), _cards()))


def _head(question: Question) -> str:
    config, asked, code = question.config, question.asked, question.code
    denoising = asked.denoising
    lengths = f"{denoising.gen_length}/{denoising.resolved_block_length}/{denoising.resolved_steps}"
    ways = "one launch each" if code.fused else "as torch runs them"
    return (
        "PREDICTED from data sheets. No card was measured.\n\n"
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary {config.vocab_size:,}, bfloat16; "
        f"prompt of {asked.prompt:,} tokens, {asked.visual:,} of them visual; gen/block/steps {lengths}.\n"
        "FLOP and bytes at the published rates, the larger of the two for each operation, so a card can hardly be\n"
        f"faster. Assumed: {question.gap * 1e6:g} us between two kernels; {question.host * 1e6:g} us of the host for "
        f"each launch, which hide behind work;\nattention that reads pages in place; norms, rotary and activations "
        f"{ways}."
    )


def _step_table(question: Question, cards: Sequence[Card]) -> str:
    columns = [f"{kind}, {percent}%" for kind in ("full", "response") for percent in question.keep]
    lines = [
        (card.name, str(batch), *_step_times(question, card, batch)) for card in cards for batch in question.batches
    ]
    block = question.asked.denoising.resolved_block_length
    return (
        "PREDICTED milliseconds of a denoising step of the whole batch, by the percent of visual tokens that are there."
        f"\nfull: computes every token; response: {block} tokens of each request, the others' keys from pages.\n\n"
        + aligned(("card", "batch", *columns), lines, NAMES)
    )


def _step_times(question: Question, card: Card, batch: int) -> Iterator[str]:
    predictor, block = question.predictor(card), question.asked.denoising.resolved_block_length
    for full in (True, False):
        for asked in map(question.kept, question.keep):
            step = Step(asked.held_after if full else block, asked.held_after, block)
            yield f"{1e3 * predictor.step(step, batch):.1f}" if question.fits(card, asked, batch) else "-"


def _request_table(question: Question, cards: Sequence[Card]) -> str:
    cells = [(cache, percent) for cache in CACHES for percent in question.keep]
    lines = [
        (card.name, str(batch), *(_requests_per_second(question, card, batch, *cell) for cell in cells))
        for card in cards
        for batch in question.batches
    ]
    return (
        "PREDICTED requests per second, by cache and percent of visual tokens kept.\n"
        "-: weights, one dense request, and the others once pruned do not fit 90 % of the card's memory.\n\n"
        + aligned(("card", "batch", *(f"{cache}, {percent}%" for cache, percent in cells)), lines, NAMES)
    )


def _requests_per_second(question: Question, card: Card, batch: int, cache: str, percent: int) -> str:
    asked = question.kept(percent, cache)
    if not question.fits(card, asked, batch):
        return "-"
    return f"{batch / question.predictor(card).request(asked, batch):.2f}"


def _cards() -> str:
    lines = [(card.name, f"{card.tflops:g}", f"{card.bandwidth:g}", f"{card.memory:g}", card.source) for card in CARDS]
    return "Published rates (bfloat16 without sparsity)\n\n" + aligned(
        ("card", "TFLOP/s", "GB/s", "GB", "source"), lines, NAMES
    )
