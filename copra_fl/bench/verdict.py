"""A benchmark in sentences for users: how fast clients train, where the time goes, what would make it faster here."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from copra_fl.bench.findings import BenchFacts, copra_ratio, ratio, split_gains
from copra_fl.bench.sizes import TRAININGS

#: share of the matmul rate below which a size is bound by overhead, and above which by arithmetic
OVERHEAD_BOUND, ARITHMETIC_BOUND = 0.25, 0.5
#: ratio of two speeds that is more than noise
FASTER = 1.03


def verdict(facts: BenchFacts) -> dict[str, list[str]]:
    """Return sentences about the sizes, by name: of our engine over Flower (e), or else in process (g)."""
    by_size = {name: list(_sentences(size)) for name, size in facts["sizes"].items()}
    return {name: sentences for name, sentences in by_size.items() if sentences}


def paragraphs(facts: BenchFacts) -> list[str]:
    """Return the verdict as one paragraph for each size."""
    return [f"{name}: {' '.join(sentences)}" for name, sentences in verdict(facts).items()]


def _sentences(size: BenchFacts) -> Iterator[str]:
    competitors, work = size["competitors"], size["size"]
    letter = next((letter for letter in "eg" if letter in competitors), None)
    if letter is None:
        return
    ours = competitors[letter]
    lora, copra = (median(ours["trainings"][training]["clients_per_second"]) for training in TRAININGS)
    where = "over Flower and Ray" if letter == "e" else "in process"
    yield (
        f"{lora:.3g} clients a second with LoRA, {copra:.3g} with CopRA, {where}, in {ours['dtype']} with "
        f"{ours['attention']} attention; {work['clients']} clients, each {work['local_steps']} steps of "
        f"{work['batch_size']} x {work['tokens']} tokens."
    )
    for gain in split_gains(competitors):
        if gain.letter == letter and gain.training == "lora":
            rival = competitors[gain.rival]["name"]
            yield (
                f"{gain.total:.2f} times as fast as {rival} ({gain.rival}): {gain.number_format:.2f} by number format "
                f"and attention, {gain.engine:.2f} by training clients together."
            )
    share = median(ours["trainings"]["lora"]["share_of_matmul_rate"])
    yield (
        f"Large matrix products of the same operations would take {share:.0%} of the time; the rest is small "
        f"operations, memory and Python{', Flower and Ray' if letter == 'e' else ''}."
    )
    yield _advice(share, competitors, copra_ratio(ours))


def _advice(share: float, competitors: BenchFacts, copra: float) -> str:
    """Return the settings that would make this machine faster, as far as this run shows."""
    advice = []
    if {"f", "g"} <= competitors.keys() and (gain := ratio(competitors, "f", "g", "lora")) > FASTER:
        advice.append(f"dtype = 'float32', in which the engine is {gain:.2f} times as fast")
    if share < OVERHEAD_BOUND:
        advice.append("more work in each step (a larger batch-size, longer texts), which costs little time")
    elif share > ARITHMETIC_BOUND:
        advice.append("more cores or a GPU, since arithmetic takes most of the time")
    else:
        advice.append("a larger batch-size, or more cores")
    if copra > FASTER:
        advice.append(f"CopRA, {copra:.2f} times as fast as LoRA")
    return f"Faster would be: {'; '.join(advice)}."
