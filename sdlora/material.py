"""What a run is trained on: its folders scanned, held-out pictures set apart, sizes chosen, and what each visit sees and hears.

All of it is a function of the config and the files: nothing here depends on how far a run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from sdlora import captions, data_folders, dataset, dataset_report, files, images, views
from sdlora.captions import CaptionRules
from sdlora.config import Config, FolderConfig
from sdlora.dataset import Finding, Sample, Visit
from sdlora.dataset_report import Report
from sdlora.errors import UserError
from sdlora.views import Item

SD_STEP_PX = 64  # the step of training sizes that Stable Diffusion was trained with


@dataclass(frozen=True)
class Found:
    """The samples of a run, those that are held out, and what was found on the way."""

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Material:
    """Samples with the items they are trained as, and the caption rules of each data folder, drawn pictures last."""

    samples: tuple[Sample, ...]
    items: tuple[Item, ...]
    rules: tuple[CaptionRules, ...]
    weights: tuple[float, ...]  # of the loss, by data folder as the rules
    starts: tuple[int, ...]  # of each item's visits, when all visits of an epoch are numbered

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The training size of each item."""
        return tuple(item.shape_px for item in self.items)

    @cached_property
    def repeats(self) -> tuple[int, ...]:
        """How often each item is seen per epoch."""
        return tuple(item.repeats for item in self.items)


def find(run: Config) -> Found:
    """Scans the run's folders; defects are findings, none is an exception."""
    scans = [_scan(folder, source) for source, folder in enumerate(run.data)]
    samples = tuple(sample for scan in scans for sample in scan.samples)
    findings = (*_untranslated(run), *(finding for scan in scans for finding in scan.findings))
    if run.validation.folder:
        apart = data_folders.scan(run.validation.folder)
        return Found(samples, apart.samples, findings + apart.findings + _seen(samples, apart.samples))
    if not run.validation.share or not samples:
        return Found(samples, (), findings)
    kept, out = dataset.split([files.sha256(one.picture) for one in samples], share=run.validation.share)
    return Found(tuple(samples[i] for i in kept), tuple(samples[i] for i in out), findings)


def examined(
    run: Config, found: Found, *, grain_px: int, resolution_px: int, token_count: Callable[[str], int] | None = None, family: str = "sd1"
) -> Iterator[tuple[int, int] | Report]:
    """The doctor's look at what was found: (done, total) after each picture, and at the end the report.

    Args:
        grain_px, resolution_px: as for `material`.
        token_count: of a text by the base's tokenizer.
        family: of the base that settings are recommended for.
    """
    return dataset_report.examine(
        found.samples, found.findings, rules=all_rules(run), kind=run.kind, batch=run.batch * run.optimizer.accumulation,
        resolutions_px=resolutions(run, resolution_px), step_px=step(run, grain_px), most_aspect=run.sizes.most_aspect,
        most_shapes=run.sizes.most_shapes, upscale=run.sizes.upscale, crop=run.sizes.crop, held_out=found.held_out,
        regularisation=[i for i, folder in enumerate(run.data) if folder.regularisation], token_count=token_count, family=family,
    )  # fmt: skip


def _seen(samples: Sequence[Sample], held_out: Sequence[Sample]) -> tuple[Finding, ...]:
    """The held-out pictures that are trained on too, byte by byte."""
    trained = {files.sha256(one.picture) for one in samples}
    seen = [one.picture for one in held_out if files.sha256(one.picture) in trained]
    what, advice = "The picture of the validation folder is also trained on.", "Take it out of one of the folders."
    return tuple(Finding("stops", "validation-seen", what, advice, picture) for picture in seen)


def find_or_refuse(run: Config) -> Found:
    """What was found, for training.

    Raises:
        UserError: as `refuse`, or if there is nothing to train on.
    """
    found = find(run)
    refuse(found.findings)
    if not found.samples:
        raise UserError("The data folders hold no picture that can be trained on; name a folder of pictures with captions.")
    return found


def refuse(findings: Sequence[Finding]) -> None:
    """Ends a run that cannot go well.

    Raises:
        UserError: with the first finding that stops, and how many more there are.
    """
    stops = [one for one in findings if one.severity == "stops"]
    if stops:
        more = f" ({len(stops) - 1} more: sdlora check says which)" if len(stops) > 1 else ""
        where = f"{stops[0].path}: " if stops[0].path else ""
        advice = stops[0].advice[:1].lower() + stops[0].advice[1:]
        raise UserError(f"{where}{stops[0].what.removesuffix('.')}; {advice}{more}")


def material(run: Config, samples: tuple[Sample, ...], *, grain_px: int, resolution_px: int) -> Material:
    """Sizes and caption rules of some samples.

    Args:
        grain_px: the smallest step of training sizes that suits the base; 64 for Stable Diffusion.
        resolution_px: the base's own, for runs that name none.

    Raises:
        UserError: if a picture's size cannot be read, or a resolution does not suit the base.
    """
    items = views.items(
        samples, [images.size_of(one.picture) for one in samples], resolutions_px=resolutions(run, resolution_px),
        step_px=step(run, grain_px), seed=run.seed,
        most_aspect=run.sizes.most_aspect, most_shapes=run.sizes.most_shapes, upscale=run.sizes.upscale, crop=run.sizes.crop,
        crops=run.sizes.crops, flip=run.sizes.flip,
    )  # fmt: skip
    starts = tuple(accumulate((item.repeats for item in items), initial=0))
    weights = (*(folder.weight for folder in run.data), run.regularisation_weight)
    return Material(samples, items, all_rules(run), weights, starts)


def resolutions(run: Config, resolution_px: int) -> list[int]:
    """Sides of the squares whose area the run's training sizes have; the base's own if the run names none."""
    wanted = run.resolution_px or resolution_px
    return [wanted] if isinstance(wanted, int) else wanted


def step(run: Config, grain_px: int) -> int:
    """The step of the run's training sizes."""
    return run.sizes.step_px or min(SD_STEP_PX, grain_px)


def all_rules(run: Config) -> tuple[CaptionRules, ...]:
    """What is done to captions, by data folder; drawn regularisation pictures, last, are taken as they are."""
    return (*(rules(run, folder) for folder in run.data), CaptionRules())


def rules(run: Config, folder: FolderConfig) -> CaptionRules:
    """What is done to the captions of a folder."""
    trigger = run.trigger if folder.trigger is None else folder.trigger
    return CaptionRules(
        trigger="" if folder.regularisation else trigger, shuffle=run.captions.shuffle, keep_first=run.captions.keep_first,
        tag_dropout=run.captions.tag_dropout, caption_dropout=run.captions.dropout, wildcards=run.captions.wildcards,
        prefix=run.captions.prefix, suffix=run.captions.suffix,
    )  # fmt: skip


def batches_per_epoch(one: Material, *, batch: int) -> int:
    """How many batches an epoch has; the last ones of a size may be smaller."""
    return dataset.steps_per_epoch(one.shapes, one.repeats, batch=batch)


def batch_at(one: Material, *, batch: int, seed: int, batch_index: int) -> tuple[int, list[Visit]]:
    """The epoch and the visits of one batch, counted from the run's first."""
    return dataset.batch_of_step(one.shapes, one.repeats, batch=batch, seed=seed, index=batch_index)


def view_at(one: Material, visit: Visit, *, seed: int, epoch: int) -> int:
    """Which of its item's views a visit shows."""
    return views.chosen(one.items[visit.sample], visit, seed=seed, epoch=epoch)


def caption_at(one: Material, visit: Visit, *, seed: int, epoch: int) -> str:
    """What is said at a visit."""
    sample = one.samples[one.items[visit.sample].sample]
    return captions.caption_at(
        sample.captions, one.rules[sample.source], seed=seed, epoch=epoch, index=one.starts[visit.sample] + visit.repeat
    )


def plain_caption(by_folder: Sequence[CaptionRules], sample: Sample) -> str:
    """A sample's caption as it would be without any chance in it."""
    calm = replace(by_folder[sample.source], shuffle=False, tag_dropout=0.0, caption_dropout=0.0)
    return captions.caption_at(sample.captions, calm, seed=0, epoch=0, index=0)


def everything_said(one: Material, *, batch: int, batches: int, seed: int) -> list[str]:
    """Every text that a run of so many batches will hear, each once, in order of first hearing."""
    heard: dict[str, None] = {}
    for batch_index in range(batches):
        epoch, visits = batch_at(one, batch=batch, seed=seed, batch_index=batch_index)
        heard.update((caption_at(one, visit, seed=seed, epoch=epoch), None) for visit in visits)
    return list(heard)


def _scan(folder: FolderConfig, source: int) -> data_folders.Scan:
    scan = data_folders.scan(
        folder.folder, repeats=folder.repeats, default_caption=folder.caption, captions_from_names=folder.captions_from_names,
        caption_lines=folder.caption_lines, caption_suffixes=folder.caption_suffixes, folder_names=folder.folder_names,
        sub_folders=folder.sub_folders, metadata=folder.metadata, masks=_masks(folder), source=source,
    )  # fmt: skip
    samples = tuple(replace(sample, alpha_mask=folder.alpha_masks) for sample in scan.samples)
    return data_folders.Scan(samples, scan.findings)


def _untranslated(run: Config) -> tuple[Finding, ...]:
    return tuple(
        Finding("warns", f"not-translated-{i}", words, "The run does without it.") for i, words in enumerate(run.untranslated)
    )  # fmt: skip


def _masks(folder: FolderConfig) -> Path | None:
    if folder.masks is None:
        return None
    return folder.masks if folder.masks.is_absolute() else folder.folder / folder.masks
