"""Names of a model's layers: which number in the path of a module is that of its layer.

A path can have several numbers: ``encoder.layers.1.blocks.0.attention.query`` of a Swin has a stage and a block in it,
``layers.1.mlp.experts.0.up_proj`` a layer and an expert, ``encoder.block.1.layer.0.SelfAttention.q`` of T5 a block and
a part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


class LayerNames:
    """The layers of a model, told from the output widths of its adapted modules (name -> width).

    The layer is the outermost number that repeats: two of its values have modules of the same names and widths below
    them. So it is the layer, not the expert, and T5's block, not its part. The stages of a Swin repeat nothing, because
    they differ in width, but the blocks in each of them do. A number of which there is one value, or below which no
    other number repeats, counts as repeating.
    """

    def __init__(self, widths: Mapping[str, int | None]) -> None:
        members: dict[str, dict[str, set[tuple[str, int | None]]]] = {}
        for module, width in widths.items():
            for prefix in _numbered(module):
                below = (module.removeprefix(prefix), width)
                members.setdefault(_pattern(prefix), {}).setdefault(prefix, set()).add(below)
        repeating = {pattern for pattern, below in members.items() if _repeats(below.values())}
        self._stages = {
            pattern
            for pattern, below in members.items()
            if len(below) > 1 and pattern not in repeating
            if any(_are_in_each(below, members[inner]) for inner in repeating)
        }

    def of(self, module: str) -> str:
        """Return the path of the layer of `module`; a module outside of all layers is one by itself.

        >>> LayerNames({}).of("encoder.layer.3.attention.self.query")
        'encoder.layer.3'
        """
        return next((prefix for prefix in _numbered(module) if _pattern(prefix) not in self._stages), module)


def _numbered(module: str) -> Iterator[str]:
    """Yield the beginnings of a path that end in a number, the shortest first."""
    parts = module.split(".")
    return (".".join(parts[: index + 1]) for index, part in enumerate(parts) if part.isdigit())


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _are_in_each(outer: Iterable[str], inner: Iterable[str]) -> bool:
    """Return whether each of the paths `outer` has one of the paths `inner` below it."""
    return all(any(path.startswith(f"{stage}.") for path in inner) for stage in outer)


def _repeats(below: Iterable[set[tuple[str, int | None]]]) -> bool:
    """Return whether two of the values of a number have the same below them."""
    contents = [frozenset(modules) for modules in below]
    return len(set(contents)) < len(contents)
