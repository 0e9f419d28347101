"""Which rows of ``layouts`` a checkpoint fits, and what would be missing or left over under each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from hpcssl.errors import EvalError
from hpcssl.nets import resnet
from hpcssl.nets.layouts import BY_NAME, LAYOUTS, NAME, Layout, Look
from hpcssl.nets.resnet import Arch
from hpcssl.nets.weights import COUNTERS, some


@dataclass(frozen=True, kw_only=True)
class Match:
    """One reading of a checkpoint: torchvision's names -> tensors, and what speaks against it, in the file's own keys.

    ``strange``: keys outside the encoder that the layout does not know. ``arch`` is None where the blocks are no
    backbone of this project; ``blocks`` describes them.
    """

    layout: Layout
    encoder: str
    tensors: dict[str, Tensor]
    missing: list[str]
    unused: list[str]
    strange: list[str]
    wrong: list[str]
    arch: Arch | None
    look: Look
    blocks: str

    @property
    def strict(self) -> bool:
        return self.arch is not None and not (self.missing or self.unused or self.wrong)

    @property
    def same_as(self) -> tuple:
        """Equal for two readings that give the same features."""
        return self.look, frozenset((name, id(tensor)) for name, tensor in self.tensors.items())

    @property
    def distance(self) -> int:
        return len(self.missing) + len(self.unused) + len(self.strange) - 2 * len(self.tensors)


def find(tree: Mapping, what: str, layout: str | None, encoder: str | None) -> Match:
    """The one strict reading of a checkpoint, by the layout named or by the one recognised.

    A layout that is named may leave out keys that it does not know, as long as they are no part of a ResNet; to be
    recognised, a checkpoint must hold known keys alone. Raises ``EvalError`` with both lists of the nearest reading,
    or with the names of the layouts between which the keys do not decide.
    """
    rows = [BY_NAME[layout]] if layout else LAYOUTS
    found = [match for row in rows for match in _matches(row, tree, encoder or next(iter(row.encoders)))]
    fits = [m for m in found if m.strict and (layout or (m.layout.known and not m.strange))]
    if len({match.same_as for match in fits}) == 1:
        return fits[0]
    if encoder == "target" and not found:
        raise EvalError(what, got=f"no target encoder{f' of {layout}' if layout else ''}", expected="one in the file",
                        mend="leave the encoder out, to take the one that the paper evaluates")
    if fits:
        names = list(dict.fromkeys(match.layout.name for match in fits))
        raise EvalError(what, got=f"keys that fit {' and '.join(names)}, which would read them differently",
                        expected="one reading", mend=f"--layout {' or --layout '.join(names)}" if len(names) > 1
                        else "keep one of the encoders in the file")
    raise _nothing(found or _elsewhere(rows, tree), tree, what, layout)


def _matches(layout: Layout, tree: Mapping, encoder: str) -> Iterator[Match]:
    """Each way in which ``layout`` finds parts of a ResNet in the checkpoint."""
    for path in layout.at:
        state = _dig(tree, path)
        for prefix in layout.encoders.get(encoder, ()):
            inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
            named = [(form, names) for form in layout.forms if inside and (names := form(inside))]
            for form, names in named:
                small = layout.small_by.get(form, layout.small)
                names = {prefix + key: name for key, name in names.items()}
                yield _match(layout, small, encoder, prefix, state, names)
            if named:
                break  # the prefixes after it are for other versions of the project


def _dig(tree: object, path: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors under ``path``; none where there is nothing of the kind."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if not isinstance(tree, Mapping):
        return {}
    return {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _match(layout: Layout, small: Look, encoder: str, prefix: str, state: dict[str, Tensor],
           names: dict[str, str]) -> Match:
    tensors = {name: state[key] for key, name in names.items() if not name.endswith(COUNTERS)}
    arch, look, blocks = _arch(tensors, layout.large, small)
    wanted = {} if arch is None else _shapes(arch)
    back = {name: key for key, name in names.items()}
    twice = [key for key, name in names.items() if back[name] != key]  # two keys for one name: only one is taken
    rest = [key for key in state if key not in names and not _known(layout, key, prefix)]
    inside = [key for key in rest if key.startswith(prefix)]
    resnets = [key for key in rest if not key.startswith(prefix) and NAME.search(key)]
    return Match(
        layout=layout, encoder=encoder, tensors=tensors, arch=arch, look=look, blocks=blocks,
        missing=sorted(prefix + name for name in wanted.keys() - tensors.keys()),
        unused=sorted([back[name] for name in tensors.keys() - (wanted or tensors).keys()] + twice + inside + resnets),
        strange=sorted(set(rest) - set(inside) - set(resnets)),
        wrong=[f"{back[name]} {list(tensors[name].shape)} instead of {list(wanted[name])}"
               for name in sorted(wanted.keys() & tensors.keys()) if tensors[name].shape != wanted[name]])


def _known(layout: Layout, key: str, prefix: str) -> bool:
    """Whether the layout knows a key as something beside the encoder, such as another encoder."""
    if key.startswith(prefix):
        return layout.pattern.match(key, len(prefix)) is not None
    others = tuple(p for prefixes in layout.encoders.values() for p in prefixes if p not in ("", "module."))
    return key.startswith(others) or layout.pattern.match(key.removeprefix("module.")) is not None


def _arch(tensors: dict[str, Tensor], large: Look, small: Look) -> tuple[Arch | None, Look, str]:
    """The architecture by its blocks and the stem by its kernel; the rest is for the strict comparison."""
    blocks = Counter()
    for name in tensors:
        if name.startswith("layer"):
            stage, block = name.removeprefix("layer").split(".")[:2]
            blocks[int(stage)] = max(blocks[int(stage)], int(block) + 1)
    counts = tuple(blocks[stage] for stage in (1, 2, 3, 4))
    deep = any(".conv3." in name for name in tensors)
    name = next((name for name, (block, layers) in resnet.RESNETS.items()
                 if layers == counts and (block is Bottleneck) == deep), None)
    kernel = tensors["conv1.weight"].shape[-1] if "conv1.weight" in tensors else 7
    look = small if kernel == 3 else large
    told = f"{'bottleneck' if deep else 'basic'} blocks {'-'.join(map(str, counts))}"
    return (None if name is None else Arch(arch=name, stem=look.stem)), look, told


@cache
def _shapes(arch: Arch) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = resnet.build(arch).state_dict()
    return {name: value.shape for name, value in state.items() if not name.endswith(COUNTERS)}


def _elsewhere(rows: Sequence[Layout], tree: Mapping) -> list[Match]:
    """A ResNet under a prefix or at a place of its own, as a reading under which all its keys are unused."""
    layout = rows[0]
    encoder, (prefix, *_) = next(iter(layout.encoders.items()))
    best: tuple[str, dict[str, str], dict[str, Tensor]] = "", {}, {}
    for state in _states(tree):
        parts = [key.split(".") for key in state]
        tails = {("".join(f"{word}." for word in words[:at]), ".".join(words[at:]))
                 for words in parts for at in range(len(words))}
        for form in {form for row in rows for form in row.forms}:
            for theirs in sorted(head for head, tail in tails if form([tail]).get(tail) == "conv1.weight"):
                names = form([key.removeprefix(theirs) for key in state
                              if key.startswith(theirs) and not key.endswith(COUNTERS)])
                best = max(best, (theirs, names, state), key=lambda found: len(found[1]))
    theirs, names, state = best
    if not any(name.startswith("layer") for name in names.values()):
        return []
    tensors = {name: state[theirs + key] for key, name in names.items()}
    arch, look, blocks = _arch(tensors, layout.large, layout.small)
    return [Match(layout=layout, encoder=encoder, tensors={}, missing=sorted(prefix + key for key in names), strange=[],
                  unused=sorted(theirs + key for key in names), wrong=[], arch=arch, look=look, blocks=blocks)]


def _states(tree: object, depth: int = 5) -> Iterator[dict[str, Tensor]]:
    if isinstance(tree, Mapping) and depth:
        yield _dig(tree, ())
        for value in tree.values():
            yield from _states(value, depth - 1)


def _nothing(found: list[Match], tree: Mapping, what: str, layout: str | None) -> EvalError:
    """The error for a checkpoint without a strict reading: about the nearest one there is."""
    known = ", ".join(resnet.RESNETS)
    mend = (f"check that it is a file of {layout}, or leave the layout out to have it recognised" if layout else
            "name the layout with --layout, one of " + ", ".join(row.name for row in LAYOUTS))
    if not found:
        keys = max((sorted(map(str, state)) for state in _states(tree)), key=len, default=[]) or sorted(map(str, tree))
        return EvalError(what, got=f"no part of a ResNet among the keys {some(keys)}",
                         expected=f"a ResNet ({known})", mend="name a checkpoint of one of these")
    near = min(found, key=lambda match: match.distance)
    what = f"{what}, read as {near.layout.name}"
    if near.arch is None:
        return EvalError(what, got=f"{near.blocks}, unused keys {some(near.unused)}",
                         expected=f"the blocks of {known}", mend="name a checkpoint of one of these")
    if near.wrong and not near.missing and not near.unused:
        return EvalError(what, got=some(near.wrong), expected=f"the shapes of {near.arch.arch}",
                         mend=f"name a checkpoint of the usual width of {known}")
    return EvalError(what, got=f"missing keys {some(near.missing)} and unused keys {some(near.unused + near.strange)}",
                     expected=f"exactly the keys of {near.arch.arch}", mend=mend)
