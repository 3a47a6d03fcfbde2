"""Losses: what each visual token shows, the masked-diffusion loss, and hints for the language model's middle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.dataset import PAD, LanguageBatch, TowerBatch
from training.model import HINTS, TinyDvlm
from training.pictures import IGNORE, normalised
from training.scenes import ATTRIBUTES
from training.tasks import TASKS

Report = dict[str, float]


def tower_loss(model: TinyDvlm, batch: TowerBatch) -> tuple[Tensor, Report]:
    """Cross entropy of every attribute of every visual token. Reports the accuracy where there is something to see."""
    visual = model.encode_tiles(normalised(batch.patches)).flatten(0, 1)
    truth = batch.labels.flatten(0, 1)
    loss = visual.new_zeros(())
    report: Report = {}
    right = torch.ones(len(truth), dtype=torch.bool)
    for i, logits in enumerate(model.attributes(visual, model.language_model.embed_tokens.weight)):
        loss = loss + functional.cross_entropy(logits, truth[:, i])
        correct = logits.argmax(-1) == truth[:, i]
        right &= correct
        seen = truth[:, i] > 0
        report[ATTRIBUTES[i]] = correct[seen].float().mean().item()
    report["all"] = right[truth.any(-1)].float().mean().item()
    report["empty"] = right[~truth.any(-1)].float().mean().item()
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


def input_embeddings(model: TinyDvlm, batch: LanguageBatch, features: Tensor) -> Tensor:
    """[batch, tokens, hidden]: word embeddings, with features [16 * tiles, hidden] where the picture stands."""
    table = torch.cat((features, model.image_newline[None]))
    words = model.language_model.embed_tokens(batch.ids)
    return torch.where(batch.source[..., None] >= 0, table[batch.source.clamp_min(0)], words)


def language_loss(model: TinyDvlm, batch: LanguageBatch, auxiliary: float, frugality: float) -> tuple[Tensor, Report]:
    """Masked-diffusion loss over the hidden canvas places, and the hints of `model.HINTS`.

    frugality: weight of the logarithm of the attention that hidden places spend on empty visual tokens. It is of no use
    to the answer, and however small, a scorer that reads attention would keep them before the name beside a value.
    """
    with torch.no_grad():
        features = model.encode_tiles(normalised(batch.patches)).flatten(0, 1)
    # Of the first four hints at least one is asked of every visual token that belongs to something.
    empty = (batch.source >= 0) & (batch.hints[..., :4] == IGNORE).all(-1)
    hidden, middle, spent = model(
        input_embeddings(model, batch, features), batch.positions, visibility(batch.group), empty.float()
    )
    places = batch.target != IGNORE
    logits, target, weight = model.logits(hidden[places]), batch.target[places], batch.weight[places]
    losses = functional.cross_entropy(logits, target, reduction="none")
    wasted = spent[places].mean()
    loss = (losses * weight).sum() / weight.sum()
    # All but the padding behind the answers.
    content = weight > 0.1 * weight.max()
    right, task = (logits.argmax(-1) == target)[content].float(), batch.task[places][content]
    report: Report = {
        "loss": loss.item(),
        "wasted": wasted.item(),
        "accuracy": right.mean().item(),
        "questions": float(batch.group.amax(1).float().mean()),
        "tokens": float((batch.group != PAD).sum(1).float().mean()),
    }
    loss = loss + frugality * (wasted + 1e-4).log()
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
                report[name] = (guesses.argmax(-1) == truth).float().mean().item()
    return loss, report
