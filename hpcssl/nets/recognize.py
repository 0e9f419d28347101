"""Find out which layout a checkpoint has, and what would be missing or left over under each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from hpcssl.errors import EvalError
from hpcssl.nets import resnet
from hpcssl.nets.key_maps import NAME
from hpcssl.nets.layouts import BY_NAME, LAYOUTS, CheckpointLayout, InputSpec
from hpcssl.nets.resnet import Arch
from hpcssl.nets.weights import COUNTER_SUFFIX, shorten_list


@dataclass(frozen=True, kw_only=True)
class LayoutMatch:
    """A checkpoint as read by one layout, and what speaks against it, in the file's own keys.

    Attributes:
        layout: The layout.
        encoder: Which of the layout's encoders, ``online`` or ``target``.
        tensors: The encoder's tensors by torchvision's names, without batch counters.
        missing: Keys of the architecture that the file does not have.
        unused: Keys of the encoder, or of another ResNet in the file, that the architecture does not use.
        unknown: Keys outside of the encoder that the layout does not know.
        wrong_shapes: Keys whose tensors have another shape than the architecture's, with both shapes.
        arch: The architecture; None where the blocks are not those of a backbone of this project.
        input_spec: The input that the encoder expects.
        blocks: Description of the blocks, for messages.
    """

    layout: CheckpointLayout
    encoder: str
    tensors: dict[str, Tensor]
    missing: list[str]
    unused: list[str]
    unknown: list[str]
    wrong_shapes: list[str]
    arch: Arch | None
    input_spec: InputSpec
    blocks: str

    @property
    def is_strict(self) -> bool:
        """Whether the architecture and the encoder's keys agree exactly."""
        return self.arch is not None and not (self.missing or self.unused or self.wrong_shapes)

    @property
    def identity(self) -> tuple[InputSpec, frozenset[tuple[str, int]]]:
        """Equal for two matches that give the same features."""
        return self.input_spec, frozenset((name, id(tensor)) for name, tensor in self.tensors.items())

    @property
    def distance(self) -> int:
        """How far the match is from a strict one; the smallest one is reported in errors."""
        return len(self.missing) + len(self.unused) + len(self.unknown) - 2 * len(self.tensors)


def find_match(content: Mapping[Any, Any], what: str, layout: str | None, encoder: str | None) -> LayoutMatch:
    """Find the one strict match of a checkpoint.

    With a named layout, keys that it does not know are left out unless they are part of a ResNet. Without one, a
    checkpoint must hold known keys alone.

    Args:
        content: Content of the file.
        what: Name of the file in errors.
        layout: Name of the layout; None to recognize it.
        encoder: ``online`` or ``target``; None for the one that the layout's paper evaluates.

    Raises:
        EvalError: If no layout matches strictly (with the missing and unused keys of the closest match), or several do
            that would give different encoders.
    """
    rows = [BY_NAME[layout]] if layout else LAYOUTS
    matches = [match for row in rows for match in _matches(row, content, encoder or next(iter(row.encoders)))]
    strict = [m for m in matches if m.is_strict and (layout or (m.layout.recognizable and not m.unknown))]
    if len({match.identity for match in strict}) == 1:
        return strict[0]
    if encoder == "target" and not matches:
        raise EvalError(
            what,
            got=f"no target encoder{f' of {layout}' if layout else ''}",
            expected="a file with a target encoder",
            fix="leave the encoder out to use the one that the paper evaluates",
        )
    if strict:
        names = list(dict.fromkeys(match.layout.name for match in strict))
        raise EvalError(
            what,
            got=f"keys that fit the layouts {' and '.join(names)}, which read them differently",
            expected="keys that fit one layout",
            fix=f"--layout {' or --layout '.join(names)}" if len(names) > 1 else "keep one of the encoders in the file",
        )
    raise _no_match_error(matches or _match_unknown_prefix(rows, content), content, what, layout)


def _matches(layout: CheckpointLayout, content: Mapping[Any, Any], encoder: str) -> Iterator[LayoutMatch]:
    """Yield each way in which ``layout`` finds parts of a ResNet in the checkpoint."""
    for location in layout.locations:
        state = _tensors_at(content, location)
        for prefix in layout.encoders.get(encoder, ()):
            inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
            renamed = [(key_map, names) for key_map in layout.key_maps if inside and (names := key_map(inside))]
            for key_map, names in renamed:
                small = layout.small_input_by_map.get(key_map, layout.small_input)
                full_names = {prefix + key: name for key, name in names.items()}
                yield _match(layout, small, encoder, prefix, state, full_names)
            if renamed:
                break  # the prefixes after it are for other versions of the project


def _tensors_at(content: object, location: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors under a path of keys; none where the path leads nowhere."""
    for key in location:
        content = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _match(
    layout: CheckpointLayout,
    small_input: InputSpec,
    encoder: str,
    prefix: str,
    state: dict[str, Tensor],
    names: dict[str, str],
) -> LayoutMatch:
    tensors = {name: state[key] for key, name in names.items() if not name.endswith(COUNTER_SUFFIX)}
    arch, input_spec, blocks = _recognize_arch(tensors, layout.imagenet_input, small_input)
    expected = {} if arch is None else _shapes(arch)
    key_of = {name: key for key, name in names.items()}
    duplicates = [key for key, name in names.items() if key_of[name] != key]  # two keys for one name: only one is used
    rest = [key for key in state if key not in names and not _is_known(layout, key, prefix)]
    inside = [key for key in rest if key.startswith(prefix)]
    other_resnets = [key for key in rest if not key.startswith(prefix) and NAME.search(key)]
    surplus = [key_of[name] for name in tensors.keys() - (expected or tensors).keys()]
    return LayoutMatch(
        layout=layout,
        encoder=encoder,
        tensors=tensors,
        arch=arch,
        input_spec=input_spec,
        blocks=blocks,
        missing=sorted(prefix + name for name in expected.keys() - tensors.keys()),
        unused=sorted(surplus + duplicates + inside + other_resnets),
        unknown=sorted(set(rest) - set(inside) - set(other_resnets)),
        wrong_shapes=[
            f"{key_of[name]} {list(tensors[name].shape)} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & tensors.keys())
            if tensors[name].shape != expected[name]
        ],
    )


def _is_known(layout: CheckpointLayout, key: str, prefix: str) -> bool:
    """Whether the layout knows a key outside of the encoder's ResNet, such as one of another encoder."""
    if key.startswith(prefix):
        return layout.pattern.match(key, len(prefix)) is not None
    prefixes = tuple(p for prefixes in layout.encoders.values() for p in prefixes if p not in ("", "module."))
    return key.startswith(prefixes) or layout.pattern.match(key.removeprefix("module.")) is not None


def _recognize_arch(
    tensors: dict[str, Tensor], imagenet_input: InputSpec, small_input: InputSpec
) -> tuple[Arch | None, InputSpec, str]:
    """The architecture, from the number of blocks and the stem's kernel. The strict comparison checks the rest."""
    blocks: Counter[int] = Counter()
    for name in tensors:
        if name.startswith("layer"):
            stage, block_number = name.removeprefix("layer").split(".")[:2]
            blocks[int(stage)] = max(blocks[int(stage)], int(block_number) + 1)
    counts = tuple(blocks[stage] for stage in (1, 2, 3, 4))
    has_bottlenecks = any(".conv3." in name for name in tensors)
    fitting = [
        name
        for name, (block, layers) in resnet.RESNETS.items()
        if layers == counts and (block is Bottleneck) == has_bottlenecks
    ]
    kernel = tensors["conv1.weight"].shape[-1] if "conv1.weight" in tensors else 7
    input_spec = small_input if kernel == 3 else imagenet_input
    description = f"{'bottleneck' if has_bottlenecks else 'basic'} blocks {'-'.join(map(str, counts))}"
    return (Arch(arch=fitting[0], stem=input_spec.stem) if fitting else None), input_spec, description


@cache
def _shapes(arch: Arch) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = resnet.build(arch).state_dict()
    return {name: value.shape for name, value in state.items() if not name.endswith(COUNTER_SUFFIX)}


def _match_unknown_prefix(rows: Sequence[CheckpointLayout], content: Mapping[Any, Any]) -> list[LayoutMatch]:
    """A ResNet under an unknown prefix or location, as a match all of whose keys are unused, for the error."""
    layout = rows[0]
    encoder, (prefix, *_) = next(iter(layout.encoders.items()))
    best: tuple[str, dict[str, str], dict[str, Tensor]] = "", {}, {}
    for state in _states(content):
        splits = _splits(state)
        for key_map in dict.fromkeys(key_map for row in rows for key_map in row.key_maps):
            for head in sorted(head for head, tail in splits if key_map([tail]).get(tail) == "conv1.weight"):
                keys = [key for key in state if key.startswith(head) and not key.endswith(COUNTER_SUFFIX)]
                names = key_map([key.removeprefix(head) for key in keys])
                best = max(best, (head, names, state), key=lambda candidate: len(candidate[1]))
    found_prefix, names, state = best
    if not any(name.startswith("layer") for name in names.values()):
        return []
    tensors = {name: state[found_prefix + key] for key, name in names.items()}
    arch, input_spec, blocks = _recognize_arch(tensors, layout.imagenet_input, layout.small_input)
    return [
        LayoutMatch(
            layout=layout,
            encoder=encoder,
            tensors={},
            missing=sorted(prefix + key for key in names),
            unknown=[],
            unused=sorted(found_prefix + key for key in names),
            wrong_shapes=[],
            arch=arch,
            input_spec=input_spec,
            blocks=blocks,
        )
    ]


def _splits(state: dict[str, Tensor]) -> set[tuple[str, str]]:
    """Every way to split a key before one of its words into a prefix and the rest."""
    words_of_keys = [key.split(".") for key in state]
    return {
        ("".join(f"{word}." for word in words[:at]), ".".join(words[at:]))
        for words in words_of_keys
        for at in range(len(words))
    }


def _states(content: object, depth: int = 5) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each dictionary in a file."""
    if isinstance(content, Mapping) and depth:
        yield _tensors_at(content, ())
        for value in content.values():
            yield from _states(value, depth - 1)


def _no_match_error(matches: list[LayoutMatch], content: Mapping[Any, Any], what: str, layout: str | None) -> EvalError:
    """The error for a checkpoint without a strict match. It describes the closest one."""
    known = ", ".join(resnet.RESNETS)
    fix = (
        f"check that it is a file of {layout}, or leave the layout out to have it recognized"
        if layout
        else "name the layout with --layout, one of " + ", ".join(row.name for row in LAYOUTS)
    )
    if not matches:
        keys = max((sorted(map(str, state)) for state in _states(content)), key=len, default=[])
        return EvalError(
            what,
            got=f"no part of a ResNet among the keys {shorten_list(keys or sorted(map(str, content)))}",
            expected=f"a ResNet ({known})",
            fix="name a checkpoint of one of these",
        )
    closest = min(matches, key=lambda match: match.distance)
    what = f"{what}, read as {closest.layout.name}"
    if closest.arch is None:
        return EvalError(
            what,
            got=f"{closest.blocks}, unused keys {shorten_list(closest.unused)}",
            expected=f"the blocks of {known}",
            fix="name a checkpoint of one of these",
        )
    if closest.wrong_shapes and not closest.missing and not closest.unused:
        return EvalError(
            what,
            got=shorten_list(closest.wrong_shapes),
            expected=f"the shapes of {closest.arch.arch}",
            fix=f"name a checkpoint with the usual width of {known}",
        )
    unused = shorten_list(closest.unused + closest.unknown)
    return EvalError(
        what,
        got=f"missing keys {shorten_list(closest.missing)} and unused keys {unused}",
        expected=f"exactly the keys of {closest.arch.arch}",
        fix=fix,
    )
