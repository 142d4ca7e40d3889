"""The doctor: what is in a set of pictures, what will happen to each, and what to mend, before anything is trained.

It opens every picture to its last byte, because a header says nothing about the rest, and measures it at the size at which it would be
trained: blur that is gone after reducing harms nobody. Each finding says what to do, and how bad it is: what stops a run, what makes
the LoRA worse, what is good to know. What cannot be known (is it a good picture?) is left to the contact sheet. Nothing is written.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdlora import buckets, caption_findings, dataset, picture_checks, picture_findings, views
from sdlora.captions import CaptionRules
from sdlora.dataset import Finding, Sample
from sdlora.images import SUFFIXES
from sdlora.picture_findings import Look
from sdlora.recipes import Recipe, recipe
from sdlora.views import Item

SEVERITIES = ("stops", "warns", "notes")

_LEFT_OUT = ("caption-missing", "caption-empty", "caption-unreadable", "not-listed")  # by the scan, for the caption alone
_ENLARGED, _SOFT = 1.05, 1.5  # times; a picture enlarged by more than the second looks soft
_CUT = 0.2  # share of the area
_LONG = 3.0  # aspect ratio: no base was trained with longer pictures
_UNEQUAL = 4.0  # times as often
_FEW = 5
_SHOWN, _LONGEST_NAME = 5, 80  # names in a line, characters in a name


@dataclass(frozen=True)
class Bucket:
    """One training size.

    Args:
        visits: per epoch.
        mean_cropped, most_cropped: share of a picture's area that is cut off, 0 to 1.
    """

    size_px: tuple[int, int]
    pictures: int
    visits: int
    mean_cropped: float
    most_cropped: float


@dataclass(frozen=True)
class Copies:
    """Pictures that show the same: the same bytes, nearly the same pixels, or those mirrored."""

    kind: Literal["exact", "near", "mirrored"]
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Report:
    """What is known about a set.

    Args:
        root: the folder that all of it lies in; names are shown relative to it.
        pictures: how many can be trained on; without those held out.
        findings: the worst first.
        tags: how many captions hold each tag, the commonest first; empty if captions are sentences.
        items: as they would be trained; `sample` counts in the samples that were given.
        recommended: for the kind that was asked for, or for each.
    """

    root: Path
    pictures: int
    held_out: int
    findings: tuple[Finding, ...]
    buckets: tuple[Bucket, ...]
    copies: tuple[Copies, ...]
    tags: tuple[tuple[str, int], ...]
    items: tuple[Item, ...]
    recommended: tuple[Recipe, ...]


def examine(
    samples: Sequence[Sample],
    findings: Sequence[Finding],
    *,
    rules: Sequence[CaptionRules],
    kind: Literal["style", "character"] | None,
    batch: int,
    resolutions_px: Sequence[int],
    step_px: int,
    most_aspect: float = 2.0,
    most_shapes: int | None = None,
    upscale: bool = True,
    crop: str = "centre",
    held_out: Sequence[Sample] = (),
    regularisation: Collection[int] = (),
    token_count: Callable[[str], int] | None = None,
    family: str = "sd1",
) -> Iterator[tuple[int, int] | Report]:
    """Looks at every picture and caption: yields (done, total) after each picture, and at the end the report.

    Args:
        samples: to be trained on.
        findings: of the scan that found them; a picture that it left out for its caption alone is still opened.
        rules: what is done to captions, for each source.
        kind: what the pictures have in common; None if that is still open.
        batch: pictures per step.
        resolutions_px, step_px, most_aspect, most_shapes, upscale, crop: as for `views.items`.
        held_out: samples for validation.
        regularisation: sources whose pictures are not learned; they ask for no trigger word and no balance.
        token_count: of a text, without begin and end; a lower bound is taken if not given.
        family: of the base that settings are recommended for.
    """
    left_out = [_picture_of(one.path) for one in findings if one.path and one.code in _LEFT_OUT and one.path.is_file()]
    every = list(dict.fromkeys([*(one.picture for one in (*samples, *held_out)), *left_out]))
    looks = yield from _looks(every, side_px=max(resolutions_px))
    readable = [i for i, one in enumerate(samples) if looks[one.picture].size_px]
    found = views.items(
        [samples[i] for i in readable], [looks[samples[i].picture].size_px or (1, 1) for i in readable],
        resolutions_px=resolutions_px, step_px=step_px, most_aspect=most_aspect, most_shapes=most_shapes, upscale=upscale, crop=crop,
    )  # fmt: skip
    items = tuple(replace(item, sample=readable[item.sample]) for item in found)
    copies = _copies([one for one in looks.values() if one.size_px])
    learned = [one for one in samples if one.source not in regularisation]
    all_findings = [
        *findings, *(finding for look in looks.values() for finding in look.findings), *_size_findings(items),
        *_bucket_findings(items, batch), *_mask_findings(samples, looks), *_balance_findings(learned),
        *_copy_findings(copies, {one.picture for one in samples}, {one.picture for one in held_out}),
        *caption_findings.of_set(learned, rules, kind=kind),
        *(each for one in samples for each in caption_findings.of_sample(one, rules[one.source], kind=kind, token_count=token_count)),
    ]  # fmt: skip
    yield Report(
        root=root([*every, *(one.path for one in all_findings if one.path)]), pictures=len(readable), held_out=len(held_out),
        findings=tuple(sorted(dict.fromkeys(all_findings), key=_worst_first)), buckets=_buckets(items), copies=copies,
        tags=caption_findings.tag_counts(learned), items=items, recommended=_recipes(kind, learned, batch, family),
    )  # fmt: skip


def _picture_of(path: Path) -> Path:
    """The picture that a finding is about, be it of its caption."""
    if path.suffix.lower() in SUFFIXES:
        return path
    return next((one for one in sorted(path.parent.iterdir()) if one.stem == path.stem and one.suffix.lower() in SUFFIXES), path)


def _looks(pictures: Sequence[Path], *, side_px: int) -> Generator[tuple[int, int], None, dict[Path, Look]]:
    """Opens pictures side by side: Pillow decodes without the interpreter's lock."""
    looks: dict[Path, Look] = {}
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        for done, look in enumerate(pool.map(partial(picture_findings.look, side_px=side_px), pictures), 1):
            looks[look.path] = look
            yield done, len(pictures)
    finally:
        pool.shutdown(cancel_futures=True)  # whoever stops asking does not wait for the rest
    return looks


def _worst_first(finding: Finding) -> tuple[int, str, str]:
    return SEVERITIES.index(finding.severity), finding.code, str(finding.path)


def _recipes(kind: str | None, samples: Sequence[Sample], batch: int, family: str) -> tuple[Recipe, ...]:
    pictures, kinds = len({one.picture for one in samples}), [kind] if kind else ["style", "character"]
    return tuple(recipe(one, pictures=pictures, batch=batch, family=family) for one in kinds if pictures)


def steps_per_epoch(report: Report, *, batch: int) -> int:
    """The number of batches in which every picture is seen as often as it should be."""
    return dataset.steps_per_epoch([one.shape_px for one in report.items], [one.repeats for one in report.items], batch=batch)


# --- sizes ---


def _size_findings(items: Sequence[Item]) -> Iterator[Finding]:
    """For each picture at the resolution that suits it least, the largest one."""
    for item in {one.views[0].picture: one for one in sorted(items, key=lambda one: one.shape_px[0] * one.shape_px[1])}.values():
        view = item.views[0]
        (width, height), (across, down) = view.original_px, view.fit.size_px
        enlarged, cut = buckets.enlargement(view.original_px, view.fit), buckets.cropped_share(view.original_px, view.fit)
        if enlarged > _ENLARGED:
            what = f"The picture has {width} by {height} px and is enlarged {enlarged:.1f} times to {across} by {down}."
            severity: Literal["warns", "notes"] = "warns" if enlarged > _SOFT else "notes"
            yield Finding(severity, "too-small", what, "Use a larger original, or a lower resolution.", view.picture)
        if (aspect := max(width, height) / min(width, height)) > _LONG:
            what = f"The picture is {aspect:.1f} times as long as wide; {cut:.0%} of it is cut off for {across} by {down}."
            yield Finding("warns", "extreme-aspect", what, "Cut out the part that matters yourself.", view.picture)
        elif cut > _CUT:
            what = f"The picture loses {cut:.0%} of its area when cut to {across} by {down}."
            yield Finding(
                "warns", "much-cropped", what, "Allow longer training sizes (sizes.most_aspect), or cut it yourself.", view.picture
            )


def _mask_findings(samples: Sequence[Sample], looks: dict[Path, Look]) -> Iterator[Finding]:
    for sample in samples:
        size_px = looks[sample.picture].size_px
        if sample.mask and size_px:
            yield from picture_findings.of_mask(sample.mask, picture_px=size_px)


def _buckets(items: Sequence[Item]) -> tuple[Bucket, ...]:
    of_size: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for item in items:
        of_size[item.shape_px].append(item)
    found = []
    for size_px, here in sorted(of_size.items(), key=lambda pair: (pair[0][0] * pair[0][1], pair[0])):
        cuts = [buckets.cropped_share(one.views[0].original_px, one.views[0].fit) for one in here]
        found.append(Bucket(size_px, len(here), sum(one.repeats for one in here), sum(cuts) / len(cuts), max(cuts)))
    return tuple(found)


def _bucket_findings(items: Sequence[Item], batch: int) -> Iterator[Finding]:
    short = [one for one in _buckets(items) if one.visits < batch]
    if len(short) > 1:
        what = f"{len(short)} training sizes have fewer visits per epoch than a batch of {batch}, so their batches are smaller."
        yield Finding("notes", "small-buckets", what, "Cap their number (sizes.most_shapes) if speed matters.")


def _balance_findings(samples: Sequence[Sample]) -> Iterator[Finding]:
    """Repeats are there to balance folders; this is about those that do the opposite, and about sets that no repeats make up for."""
    groups: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.source, sample.repeats].append(sample)
    visits = {key: len(group) * key[1] for key, group in groups.items()}
    pairs = [(visits[more] / visits[less], more, less) for more in groups for less in groups if more[1] > less[1]]
    if pairs and (worst := max(pairs))[0] > _UNEQUAL:
        _, more, less = worst
        folder, other = groups[more][0].picture.parent, groups[less][0].picture.parent
        what = f"The folder is seen {visits[more]} times per epoch by its repeats, {other.name} {visits[less]} times."
        yield Finding("warns", "unbalanced-repeats", what, "Choose repeats so that pictures times repeats are alike.", folder)
    if 0 < (count := len({sample.picture for sample in samples})) < _FEW:
        yield Finding("warns", "few-pictures", f"There {_are(count, 'picture')} to learn from.", "Add more: 10 to 50 are usual.")


# --- copies ---


def _copies(looks: Sequence[Look]) -> tuple[Copies, ...]:
    """Groups of copies; of the same bytes the first stands for all when likeness is looked for."""
    same: dict[str, list[Look]] = defaultdict(list)
    for look in looks:
        same[look.digest].append(look)
    exact = [Copies("exact", tuple(one.path for one in group)) for group in same.values() if len(group) > 1]
    first = [group[0] for group in same.values()]
    if not first:
        return ()
    pairs = picture_checks.alike(np.stack([one.fingerprint for one in first if one.fingerprint is not None]))
    straight = {(i, j) for i, j, flipped in pairs if not flipped}
    near = list[Copies]()
    for group in picture_checks.groups(len(first), [(i, j) for i, j, _ in pairs]):
        kind: Literal["near", "mirrored"] = "near" if any((i, j) in straight for i, j in combinations(group, 2)) else "mirrored"
        near.append(Copies(kind, tuple(first[i].path for i in group)))
    return (*exact, *near)


def _copy_findings(copies: Sequence[Copies], trained: set[Path], held_out: set[Path]) -> Iterator[Finding]:
    for group in copies:
        words, severity, advice = _COPIES[group.kind]
        seen, kept = [one for one in group.pictures if one in trained], [one for one in group.pictures if one in held_out]
        if seen and kept:
            what = f"The picture is held out, and {words} {_listed([one.name for one in seen])} in training."
            yield Finding("warns", "seen-in-validation", what, "Take one of them out, or validation measures memory.", kept[0])
        first, *others = [one for one in group.pictures if one not in held_out] or group.pictures
        if others:
            what = f"The picture {words} {_listed([one.name for one in others])}."
            yield Finding(severity, f"copy-{group.kind}", what, advice, first)


_COPIES: dict[str, tuple[str, Literal["warns", "notes"], str]] = {
    "exact": ("is the same file as", "warns", "Keep one, or give repeats if it should count for more."),
    "near": ("shows nearly the same as", "warns", "Keep the best one, or it counts for more than others."),
    "mirrored": ("shows mirrored what is in", "notes", "Set sizes.flip, which mirrors all pictures, if that is meant."),
}


# --- in words ---


def lines(report: Report, *, batch: int) -> list[str]:
    """The report in sentences: the set, each kind of finding in one line with its first names, the sizes, what to begin with."""
    visits, steps = sum(one.visits for one in report.buckets), steps_per_epoch(report, batch=batch)
    held = f", {report.held_out} held out" if report.held_out else ""
    epoch = f"an epoch shows {_count(visits, 'picture')} in {_count(steps, 'step')} of {batch}"
    sizes = _count(len(report.buckets), "training size")
    said = [f"{_count(report.pictures, 'picture')}{held} in {sizes}; {epoch}."] if report.pictures else []
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in report.findings:
        kinds[finding.severity, finding.code].append(finding)
    said += [f"{severity}: {_folded(same, report.root)}" for (severity, _), same in kinds.items()]
    for one in report.buckets:
        cut = f"{one.mean_cropped:.1%} of each cut off, {one.most_cropped:.1%} at most"
        said.append(f"size {one.size_px[0]} by {one.size_px[1]}: {_count(one.pictures, 'picture')}, {cut}.")
    return said + [f"for a {one.kind} on {one.title}: {' '.join(one.reasons)}" for one in report.recommended]


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values; keys stay as they are from version to version."""
    return {
        "pictures": report.pictures,
        "held_out": report.held_out,
        "counts": {severity: sum(one.severity == severity for one in report.findings) for severity in SEVERITIES},
        "findings": [asdict(one) | {"path": str(one.path) if one.path else None} for one in report.findings],
        "sizes": [asdict(one) | {"size_px": list(one.size_px)} for one in report.buckets],
        "copies": [{"kind": one.kind, "pictures": [str(path) for path in one.pictures]} for one in report.copies],
        "tags": dict(report.tags),
        "recommended": [asdict(one) | {"reasons": list(one.reasons)} for one in report.recommended],
    }


def root(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of them."""
    folders = {str((path if path.is_dir() else path.parent).absolute()) for path in paths}
    return Path(os.path.commonpath(folders)) if folders else Path().absolute()


def shown(path: Path, root: Path) -> str:
    """A file's name as it is shown: from the root on, and on one line whatever characters it holds."""
    path = path.absolute()
    name = path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name
    name = name if name.isprintable() else ascii(name)[1:-1]
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _folded(same: Sequence[Finding], root: Path) -> str:
    """Findings of one kind as one line."""
    advice = ("" if len({one.advice for one in same}) == 1 else "For example: ") + same[0].advice
    names = [shown(one.path, root) if one.path else "" for one in same]
    if len({one.what for one in same}) == 1 and names[0]:
        return f"{_listed(names)}: {same[0].what} {advice}"
    each = [f"{name}: {one.what}" if name else one.what for name, one in zip(names, same, strict=True)]
    return f"{_listed(each, between=' ', last='And so on for')}{'.' if len(each) > _SHOWN else ''} {advice}"


def _listed(names: Sequence[str], *, between: str = ", ", last: str = "and") -> str:
    more = len(names) - _SHOWN
    return between.join(names[:_SHOWN]) + (f" {last} {more} more" if more > 0 else "")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _are(count: int, what: str) -> str:
    return f"{'is' if count == 1 else 'are'} only {_count(count, what)}"
