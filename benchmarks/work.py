"""The arithmetic, the memory traffic and the launches of a denoising step and of a picture's encoding.

Each piece of `Work` is of one kind; a machine has rates for each kind (`machines.py`). FLOP are those of matrix
products, a multiply and an add being two, as torch counts them. Bytes are what an operation has to read and write if
nothing stays in a processor's cache from the one before. Launches are calls of torch that compute or copy something:
no views, no conversions to the dtype that a tensor has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from request_steps import Step

from redvtp.families.config import DvlmConfig
from redvtp.vision.path import TiledVision

# Linears, head, and the products in which visual tokens are scored.
PRODUCTS = "products"
# Scaled dot product attention.
ATTENTION = "attention"
# Norms, rotary, activations, residuals: whole tensors, one after another.
ELEMENTWISE = "elementwise"
# Rows of pages, read to another place or written.
GATHERS = "gathers"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, GATHERS)
# Calls of a step outside its layers: for packing and proposals, for the choice of visual tokens, for their moves.
CALLS_AROUND, CALLS_TO_CHOOSE, CALLS_TO_MOVE = 40, 45, 20


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one kind, in FLOP, bytes and launches."""

    kind: str
    flops: float
    bytes: float
    launches: float

    def times(self, count: int, launches: float | None = None) -> Work:
        """The same `count` times. launches: in all, where they do not grow with it."""
        launched = count * self.launches if launches is None else launches
        return Work(self.kind, count * self.flops, count * self.bytes, launched)


@dataclass(frozen=True, slots=True)
class Code:
    """What runs the model.

    itemsize: bytes of a weight, an activation, a cached number.
    in_place: attention reads pages where they are, and scores come from its log-sum-exp. Otherwise torch's: keys and
        values are gathered first, and scored rows have a softmax of their own.
    fused: norm with residual, rotary, activation with its product are a launch each.
    """

    itemsize: int
    in_place: bool = False
    fused: bool = False


def step_work(config: DvlmConfig, step: Step, batch: int, code: Code) -> list[Work]:
    """One step that `batch` requests take together."""
    layers = config.num_hidden_layers
    return [
        *(linear.times(layers) for linear in linears_work(config, batch * step.rows, code)),
        elementwise_work(config, batch * step.rows, code).times(layers),
        *_attention(config, step, batch, code),
        *_scoring(config, step, batch, code),
        *_choice(config, batch * step.candidates, code),
        *_moves(config, batch * step.moved, code),
        Work(ELEMENTWISE, 0, 0, CALLS_AROUND),
    ]


def product(rows: int, columns: int, out: int, itemsize: int) -> Work:
    """[rows, columns] by a weight [columns, out]."""
    moved = (columns * out + rows * (columns + out)) * itemsize
    return Work(PRODUCTS, 2 * rows * columns * out, moved, 1)


def _widths(config: DvlmConfig) -> tuple[int, int]:
    """Of queries, and of keys."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def linear_sizes(config: DvlmConfig) -> list[tuple[int, int]]:
    """(columns, out) of each linear of a layer."""
    hidden, inner, (width, kv_width) = config.hidden_size, config.intermediate_size, _widths(config)
    heads = [(hidden, width), (hidden, kv_width), (hidden, kv_width), (width, hidden)]
    return [*heads, (hidden, inner), (hidden, inner), (inner, hidden)]


def linears_work(config: DvlmConfig, rows: int, code: Code) -> list[Work]:
    """Of one layer."""
    return [product(rows, columns, out, code.itemsize) for columns, out in linear_sizes(config)]


def attention_work(config: DvlmConfig, rows: int, keys: int, code: Code) -> Work:
    """Of a sequence in one layer, without the pages."""
    width, kv_width = _widths(config)
    moved = (2 * keys * kv_width + 2 * rows * width) * code.itemsize
    return Work(ATTENTION, 4 * rows * keys * width, moved, 1)


def pages_work(config: DvlmConfig, tokens: int, code: Code) -> Work:
    """Keys and values of one layer, read from its pages to another place or written to them."""
    _, kv_width = _widths(config)
    return Work(GATHERS, 0, 4 * tokens * kv_width * code.itemsize, 2)


def elementwise_work(config: DvlmConfig, rows: int, code: Code) -> Work:
    """Two norms, two residuals, rotary of queries and keys, the activation and its product, of one layer."""
    hidden, inner, itemsize = config.hidden_size, config.intermediate_size, code.itemsize
    rotated = sum(_widths(config))
    if code.fused:
        return Work(ELEMENTWISE, 0, rows * (2 * 4 * hidden + 2 * rotated + 3 * inner) * itemsize, 4)
    # A norm in float32 and the weight's product; where the dtype is another, a conversion before and after it.
    casts = 0 if itemsize == 4 else 2
    norm = hidden * (2 * 4 + 3 * itemsize + casts * (4 + itemsize))
    # Rotary: two products, one half negated, two halves joined, a sum. The activation and its product are in place.
    others = itemsize * (2 * 3 * hidden + 10 * rotated + 5 * inner)
    return Work(ELEMENTWISE, 0, rows * (2 * norm + others), 2 * (2 + casts) + 2 + 2 * 5 + 2)


def _attention(config: DvlmConfig, step: Step, batch: int, code: Code) -> Iterator[Work]:
    layers = config.num_hidden_layers
    # A paged kernel takes the whole batch; torch's attention is a call for each sequence.
    launches = layers if code.in_place else layers * batch
    yield attention_work(config, step.rows, step.keys, code).times(layers * batch, launches)
    yield pages_work(config, batch * step.rows, code).times(layers)
    if not (code.in_place or step.full):
        yield pages_work(config, batch * step.keys, code).times(layers)


def _scoring(config: DvlmConfig, step: Step, batch: int, code: Code) -> Iterator[Work]:
    if not step.scored:
        return
    yield Work(ELEMENTWISE, 0, 0, CALLS_TO_CHOOSE)
    (width, kv_width), of_all = _widths(config), config.num_hidden_layers * batch
    if code.in_place:
        # Visual keys are read once more; the normaliser is the attention's.
        moved = step.visual * kv_width * code.itemsize
        yield Work(PRODUCTS, 2 * step.scored * step.visual * width, moved, 1).times(of_all, config.num_hidden_layers)
        return
    # torch's: keys are laid out anew in float32; weights are written, normalised, and the visual ones read and summed.
    weights = 4 * step.scored * config.num_attention_heads
    yield Work(GATHERS, 0, step.keys * width * (code.itemsize + 3 * 4), 4).times(of_all)
    yield Work(PRODUCTS, 2 * step.scored * step.keys * width, step.keys * width * 4, 1).times(of_all)
    yield Work(ELEMENTWISE, 0, weights * 3 * (step.keys + step.visual), 5).times(of_all)


def _choice(config: DvlmConfig, rows: int, code: Code) -> Iterator[Work]:
    """Logits of the candidates, in float32, and their probabilities in float64."""
    yield product(rows, config.hidden_size, config.vocab_size, code.itemsize)
    yield Work(ELEMENTWISE, 0, rows * config.vocab_size * (2 * code.itemsize + 4 * 4 + 4 * 8), 0)


def _moves(config: DvlmConfig, tokens: int, code: Code) -> Iterator[Work]:
    """Survivors' keys and values to their new pages, keys turned in float32."""
    if not tokens:
        return
    yield Work(ELEMENTWISE, 0, 0, CALLS_TO_MOVE)
    layers, (_, kv_width) = config.num_hidden_layers, _widths(config)
    if code.in_place:
        yield pages_work(config, tokens, code).times(layers, 1)
        return
    yield pages_work(config, 2 * tokens, code).times(layers, 4 * layers)
    yield Work(ELEMENTWISE, 0, tokens * kv_width * (10 * 4 + 2 * code.itemsize), 12).times(layers)


def encoding_work(config: DvlmConfig, tiles: int, code: Code) -> list[Work]:
    """A picture's tiles through tower and projector."""
    vision = config.vision
    assert isinstance(vision, TiledVision)
    tower, itemsize = vision.tower, code.itemsize
    width, inner, patches = tower.hidden_size, tower.intermediate_size, tower.side**2
    rows, layers = tiles * patches, tower.kept_layers(vision.select_layer)
    # Two norms, two residuals, the activation. Linears add their biases as they write.
    passes = Work(ELEMENTWISE, 0, rows * (2 * 2 * width + 2 * 3 * width + 2 * inner) * itemsize, 5)
    return [
        product(rows, 3 * tower.patch_size**2, width, itemsize),
        product(rows, width, width, itemsize).times(4 * layers),
        product(rows, width, inner, itemsize).times(layers),
        product(rows, inner, width, itemsize).times(layers),
        Work(ATTENTION, 4 * rows * patches * width, 4 * rows * width * itemsize, 1).times(layers),
        passes.times(layers),
        product(rows, width, config.hidden_size, itemsize),
        Work(ELEMENTWISE, 0, rows * 2 * config.hidden_size * itemsize, 1),
        product(rows, config.hidden_size, config.hidden_size, itemsize),
    ]
