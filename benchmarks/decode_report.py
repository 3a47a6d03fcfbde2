"""What `decode.py` measured, as text: the table of settings, scoring memory, and where a step's time goes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from redvtp.evaluation.table import aligned

MIB = 2**20
NAMES = frozenset({"cache", "setting", "part"})


def report(results: dict[str, Any]) -> str:
    """The tables, as text."""
    machine, model, request = results["machine"], results["model"], results["request"]
    lengths = "/".join(str(request[name]) for name in ("gen_length", "block_length", "steps"))
    head = (
        f"{model['family']}, {model['layers']} layers, hidden {model['hidden']}, {model['dtype']}, "
        f"{machine['device']} with {machine['threads']} threads; prompt of {request['prompt_tokens']:,} tokens, "
        f"{request['visual_tokens']:,} of them visual; gen/block/steps {lengths}; "
        f"fastest of {results['repeats']} interleaved runs"
    )
    thresholds = any(row["threshold"] is not None for row in results["rows"])
    columns = (
        "cache", *(("threshold",) if thresholds else ()), "setting", "visual kept", "steps", "latency s", "median s",
        "tokens/s", "ratio", "FLOP ceiling", "of ceiling", "peak MiB", "later MiB", "KV blocks", "agreement",
    )  # fmt: skip
    lines = [
        (
            row["cache"], *((_threshold(row),) if thresholds else ()), row["setting"],
            f"{row['visual_tokens_kept']:,}", str(row["steps"]), f"{row['latency_s']:.3f}",
            f"{statistics.median(row['latencies_s']):.3f}", f"{row['tokens_per_s']:.2f}",
            f"{row['ratio']:.2f}", f"{row['ceiling']:.2f}", f"{row['reached']:.0%}", f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['later_peak_bytes'] / MIB:.0f}", f"{row['kv_blocks_admitted']} -> {row['kv_blocks_at_end']}",
            f"{row['agreement']:.0%}",
        )
        for row in results["rows"]
    ]  # fmt: skip
    notes = (
        "ratio: dense latency without cache over this latency. FLOP ceiling: the same ratio if only matrix products\n"
        "took time, for the tokens that each step really computed. peak MiB: highest memory above the weights, KV\n"
        "blocks held included; later MiB: after the first step. KV blocks: at admission -> at the end, of\n"
        f"{results['block_size']} tokens. agreement: canvas tokens equal to dense's without cache; the weights are\n"
        "random, so it says nothing about accuracy."
    )
    return "\n\n".join((head, _aligned(columns, lines), notes, _scoring_memory(results), _step_table(results)))


def _threshold(row: dict[str, Any]) -> str:
    return "-" if row["threshold"] is None else f"{row['threshold']:g}"


def _scoring_memory(results: dict[str, Any]) -> str:
    """A step that scores against one of the same length that does not."""
    by_setting = results["first_step_bytes"]
    plain = by_setting["dense, cache none"]
    lines = [
        (label, f"{peak / MIB:.1f}", f"{peak / plain:.3f}")
        for label, peak in by_setting.items()
        if label.endswith("cache none")
    ]
    return "Peak memory of the first step (activations only; dense scores no visual token in it)\n" + _aligned(
        ("setting", "MiB", "of dense"), lines
    )


def _step_table(results: dict[str, Any]) -> str:
    """Where a step's time goes, dense and with the last policy at its strongest: steps as columns, parts as rows."""
    seconds = results["step_seconds"]
    last = [row for row in results["rows"] if row["threshold"] is None][-1]
    most_pruned, last_cache = last["setting"], last["cache"]
    columns: dict[str, dict[str, float]] = {}
    for setting in dict.fromkeys(("dense", most_pruned)):
        for cache, kind in (("none", "full"), *(((last_cache, "response"),) if last_cache != "none" else ())):
            times = seconds.get(f"{setting}, cache {cache}")
            if times is None:
                continue
            # If the prompt stays in its pages, the first step also moves the survivors: it has the most parts.
            if setting != "dense" and cache == last_cache:
                columns[f"{setting}, first"] = times["first"]
            columns[f"{setting}, {kind}"] = times["later"]
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    totals = {name: sum(column.values()) for name, column in columns.items()}
    lines = [
        (
            part,
            *(f"{column.get(part, 0) * 1e3:.1f} ({column.get(part, 0) / totals[name]:.0%})"
              for name, column in columns.items()),
        )
        for part in parts
    ]  # fmt: skip
    lines.append(("whole step", *(f"{total * 1e3:.1f}" for total in totals.values())))
    encode = statistics.median(times["encode"] for times in results["step_seconds"].values())
    return (
        "Where a step's time goes, ms (first: full, scores and prunes; full, response: mean of the later steps)\n"
        + _aligned(("part", *columns), lines)
        + f"\n\nEncoding the image (tower, projector, merge), once a request: {encode * 1e3:.0f} ms"
    )


def _aligned(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return aligned(columns, lines, NAMES)
