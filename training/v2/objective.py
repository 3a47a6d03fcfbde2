"""Losses: what each visual token shows, the masked-diffusion loss, and hints for the language model's middle.

Nothing here looks at attention, and nothing is asked of tokens that show nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.v2.batches import PAD, LanguageBatch, TowerBatch
from training.v2.model import SmallDvlm
from training.v2.pictures import HINTS, IGNORE, normalised
from training.v2.questions import TASKS
from training.v2.world import ATTRIBUTES, BASE

Report = dict[str, float]


def tower_loss(model: SmallDvlm, batch: TowerBatch) -> tuple[Tensor, Report]:
    """Cross entropy of every attribute of every visual token. Reports the accuracy where there is something to see."""
    visual = model.encode_tiles(normalised(batch.patches)).flatten(0, 1)
    truth = batch.labels.flatten(0, 1)
    loss = visual.new_zeros(())
    report: Report = {}
    base = truth[:, -1] == BASE
    right = torch.ones(len(truth), dtype=torch.bool)
    for i, logits in enumerate(model.attributes(visual, model.language_model.embed_tokens.weight)):
        loss = loss + functional.cross_entropy(logits, truth[:, i])
        correct = logits.argmax(-1) == truth[:, i]
        right &= correct
        report[ATTRIBUTES[i]] = correct[(truth[:, i] > 0) & ~base].float().mean().item()
    report["all"] = right[truth.any(-1) & ~base].float().mean().item()
    report["empty"] = right[~truth.any(-1)].float().mean().item()
    report["base"] = right[base].float().mean().item()
    # Keeps the tokens' length near that of a sum of word embeddings.
    loss = loss + 1e-4 * visual.square().sum(-1).mean()
    return loss, report


def visibility(group: Tensor) -> Tensor:
    """Additive attention mask [batch, 1, tokens, tokens] for the groups of a `LanguageBatch`."""
    key, query = group[:, None, :], group[:, :, None]
    seen = (key == 0) | (key == query) | ((query == 0) & (key == 1))
    seen &= key != PAD
    # Padding sees something, anything, or its softmax would be NaN.
    seen |= (query == PAD) & (key == 0)
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]


def input_embeddings(model: SmallDvlm, batch: LanguageBatch, features: Tensor) -> Tensor:
    """[batch, tokens, hidden]: word embeddings, with features [16 * tiles, hidden] where the picture stands."""
    table = torch.cat((features, model.image_newline[None]))
    words = model.language_model.embed_tokens(batch.ids)
    return torch.where(batch.source[..., None] >= 0, table[batch.source.clamp_min(0)], words)


def language_loss(
    model: SmallDvlm, batch: LanguageBatch, auxiliary: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Report]:
    """Masked-diffusion loss over the hidden canvas places, and the hints of `pictures.HINTS`.

    dtype: of the matrix products.
    """
    with torch.no_grad():
        features = model.encode_tiles(normalised(batch.patches)).flatten(0, 1)
    hidden, middle = model(input_embeddings(model, batch, features), batch.positions, visibility(batch.group).to(dtype))
    places = batch.target != IGNORE
    logits, target, weight = model.logits(hidden[places]), batch.target[places], batch.weight[places]
    losses = functional.cross_entropy(logits, target, reduction="none")
    loss = (losses * weight).sum() / weight.sum()
    # All but the padding behind the answers.
    content = weight > 0.1 * weight.max()
    right, task = (logits.argmax(-1) == target)[content].float(), batch.task[places][content]
    report: Report = {
        "loss": loss.item(),
        "accuracy": right.mean().item(),
        "questions": float(batch.group.amax(1).float().mean()),
        "tokens": float((batch.group != PAD).sum(1).float().mean()),
    }
    report |= {name: right[task == i].mean().item() for i, name in enumerate(TASKS)}
    if auxiliary:
        shown = (batch.hints != IGNORE).any(-1)
        middle, hints = model.hint_norm(middle[shown]), batch.hints[shown]
        for i, name in enumerate(HINTS):
            known = hints[:, i] != IGNORE
            if known.any():
                guesses, truth = model.hints[name](middle[known]), hints[known, i]
                # Counting is the slowest to learn, and lists hang on it.
                share = auxiliary * (3.0 if name == "rank" else 1.0)
                loss = loss + share * functional.cross_entropy(guesses, truth)
                report[f"hint_{name}"] = (guesses.argmax(-1) == truth).float().mean().item()
    return loss, report
