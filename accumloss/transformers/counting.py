"""What an item is: how the labels of a loss are found in a micro-batch, and counted in all of a step's.

A loss averages over items: labels that are not ignored, pixels, rows, boxes. A Rule counts them in any micro-batch; an Origin
says how a head makes the labels that it calls a loss with from an entry of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..linear import ValidCount, count_each
from ..linear import device as devices
from ..sums import wide_dtype, widened


class Rule(NamedTuple):
    """How the items of a term are found in any micro-batch of the step."""

    key: str  # the entry that holds the labels
    shift: int = 0  # the first labels of each row are no targets
    ignore_index: int | None = -100  # None: every element is an item
    length_of: str | None = None  # question answering: positions beyond dimension 1 of this entry are no items
    longer_by: int = 0  # logits have so many more positions than the entry: patches of an image
    weight: torch.Tensor | None = None  # (V,) class weights: an item counts as much as its class weighs
    mask: str | None = None  # labels where this entry is not 1 are no items
    part: int | None = None  # the labels are entry[..., part]: a codebook of several
    copies: int = 1  # as often the labels are targets: heads that predict several tokens ahead
    last: int = 0  # so many labels at the end of each row are no targets either
    filled: int | None = None  # labels of this value are no items: padding that the head ignores
    half: int | None = None  # only the first (0) or the second (1) half of the rows: chosen and rejected ones
    of: int = 2  # in as many parts are the rows, of which half is one

    def labels(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The entry, or its part, without the first and the last labels of each row."""
        return self._targets(batch[self.key] if self.part is None else batch[self.key][..., self.part])

    def _targets(self, entry: torch.Tensor) -> torch.Tensor:
        entry = half_of(entry, self.half, self.of)
        if not self.shift and not self.last:
            return entry  # a row that was squeezed has no dimension
        return entry[..., self.shift : entry.shape[-1] - self.last]

    def total(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The items of one micro-batch, or their total weight: () in the widest dtype on the device of the entry."""
        labels = self.labels(batch)
        if self.length_of is not None:
            length = batch[self.length_of].shape[1] + self.longer_by
            is_item = labels.clamp(0, length) != length
        elif self.ignore_index is not None:
            is_item = labels != self.ignore_index
        elif self.mask is None and self.filled is None:
            return torch.full((), labels.numel(), dtype=wide_dtype(labels.device), device=labels.device)
        else:
            is_item = torch.ones_like(labels, dtype=torch.bool)
        if self.mask is not None:
            is_item = is_item & (self._targets(batch[self.mask]) == 1)
        if self.filled is not None:
            is_item = is_item & (labels != self.filled)
        if self.weight is None:
            return widened(is_item.sum()) * self.copies
        weight = self.weight.to(labels.device, wide_dtype(labels.device))
        return weight[torch.where(is_item, labels, 0).long()].masked_fill(~is_item, 0).sum() * self.copies

    def weighted(self, weight: torch.Tensor | None) -> Rule:
        """The same items, of these class weights."""
        return self if weight is self.weight else self._replace(weight=weight)

    def __hash__(self) -> int:
        return hash((self[:_WEIGHT], self[_WEIGHT + 1 :], id(self.weight)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return False
        without = self[:_WEIGHT] == other[:_WEIGHT] and self[_WEIGHT + 1 :] == other[_WEIGHT + 1 :]
        return without and self.weight is other.weight

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple's own would compare the weights


_WEIGHT = Rule._fields.index("weight")  # a tensor, which is compared by identity


class Origin(NamedTuple):
    """How a head makes the labels of a call from an entry of the batch."""

    key: str
    first: int = 0  # the first labels of each row are left out
    mask: str | None = None  # an entry: only where it is 1
    part: int | None = None  # of the last dimension
    kept: str = "all"  # of the entry: all, items (not ignored), rows (with an item), seen (where the mask is 1), copies
    last: int = 0  # the last labels of each row are left out
    front: int = 0  # columns of ignored labels stand before each row: a prompt that is learned
    back: int = 0  # and behind it: padding
    filled: int | None = None  # labels of this value are ignored
    half: int | None = None  # of the rows: the first (0) or the second (1)

    def copies_in(
        self,
        labels: torch.Tensor,
        batch: Mapping[str, Any],
        shift: int,
        ignore_index: int | None,
        length: int | None,
    ) -> int:
        """How often a call's labels hold what this makes of a micro-batch; 0 where they are something else."""
        entry = batch[self.key]
        if self.part is not None:
            entry = entry[..., self.part]
        if self.kept == "copies":  # of the whole entry; a part that is ignored altogether counts nothing
            if entry.numel() == 0:
                return 0
            chunks = labels.reshape(-1).split(entry.numel())
            copies = [chunk for chunk in chunks if not bool((chunk == ignore_index).all())]
            return len(copies) if all(same_values(entry, chunk) for chunk in copies) else 0
        mask = None if self.mask is None else batch[self.mask]
        if length is not None:
            entry, labels = entry.clamp(0, length), labels.clamp(0, length)  # as the head may have done already
        elif self.first or self.last:
            inside = slice(self.first, entry.shape[-1] - self.last)
            entry, mask = entry[..., inside], mask if mask is None else mask[..., inside]
        entry, mask = half_of(entry, self.half), mask if mask is None else half_of(mask, self.half)
        if self.front or self.back:
            labels = labels.reshape(*entry.shape[:-1], -1)
            inside = slice(self.front, labels.shape[-1] - self.back)
            for beside in (labels[..., : self.front], labels[..., inside.stop :]):
                if not bool(torch.eq(beside, -100 if ignore_index is None else ignore_index).all()):
                    return 0
            labels = labels[..., inside]
        if self.filled is not None and ignore_index is not None:
            entry = entry.masked_fill(entry == self.filled, ignore_index)
        if self.kept == "items":
            entry = entry[torch.ne(entry, -100 if ignore_index is None else ignore_index)]
        elif self.kept == "rows":
            entry = entry[torch.ne(entry, -100 if ignore_index is None else ignore_index)[..., shift:].any(-1)]
        elif self.kept == "seen":
            entry = entry if mask is None else entry[mask == 1]
        elif mask is not None and ignore_index is not None:
            entry = torch.where(mask == 1, entry, ignore_index)
        return int(entry.numel() == labels.numel() and same_values(entry, labels))


def half_of(entry: torch.Tensor, half: int | None, of: int = 2) -> torch.Tensor:
    """The first (0) or the second (1) half of the rows, or one of more parts; None: all."""
    if half is None:
        return entry
    rows = entry.shape[0] // of
    return entry[half * rows : None if half == of - 1 else (half + 1) * rows]


def likely_origins(
    entries: Mapping[str, torch.Tensor], labels: torch.Tensor, ignore_index: int | None, length: int | None
) -> Iterator[Origin]:
    """The origins that labels of this size may have; the likeliest first."""
    masks = {key: value for key, value in entries.items() if "mask" in key}
    masks = dict(sorted(masks.items(), key=lambda entry: entry[0] == "attention_mask"))  # another is there for the loss
    size = labels.numel()
    for key, entry in entries.items():
        shifted = entry[..., 1:].numel() if entry.dim() > 1 and length is None else -1
        seen_by = [name for name, mask in masks.items() if mask.shape == entry.shape] if may_be_labels(key) else []
        if entry.numel() == size:
            if labels.dim() == 1 and entry.dim() > 1 and length is None:
                # flattened into a copy: something was masked or dropped, though nothing is in this one
                yield from (Origin(key, mask=mask, kept="seen") for mask in seen_by)
            yield Origin(key)
            if ignore_index is not None:
                yield from (Origin(key, mask=mask) for mask in seen_by)
                if entry.dim() > 1 and may_be_labels(key):
                    yield Origin(key, first=1, back=1)  # shifted, and padded to their length again
        elif shifted == size:
            yield Origin(key, first=1)
        if length is not None or not may_be_labels(key):
            continue
        if entry.dim() > 2 and entry.numel() == size * entry.shape[-1]:
            yield from (Origin(key, part=part) for part in range(entry.shape[-1]))
        if size < entry.numel():
            yield from (Origin(key, mask=mask, kept="seen") for mask in seen_by)
            if ignore_index is not None:
                yield Origin(key, kept="items")
                if entry.dim() > 1 and labels.dim() > 1 and labels.shape[-1] == entry.shape[-1]:
                    yield Origin(key, kept="rows")
        elif ignore_index is not None and 0 < entry.numel() < size and size % entry.numel() == 0:
            yield Origin(key, kept="copies")


def reshaping_origins(
    entries: Mapping[str, torch.Tensor], labels: torch.Tensor, ignore_index: int | None, length: int | None
) -> Iterator[Origin]:
    """Origins that are looked for where no likely one fits: rows that are shorter or longer than the entry's, half of the
    rows, labels of one value ignored, ids where another entry is 1."""
    if ignore_index is None or length is not None:
        return
    size = labels.numel()
    whole = {key: entry for key, entry in entries.items() if entry.dim() and not entry.is_floating_point()}
    for key, entry in whole.items():
        columns = entry.shape[-1]
        rows = entry.numel() // max(columns, 1)
        if rows and size % rows == 0 and entry.dim() > 1 and may_be_labels(key):
            more = size // rows - columns
            if more > 0:
                yield Origin(key, front=more)
                yield Origin(key, back=more)
            elif more < 0:
                if more < -1:
                    yield Origin(key, first=-more)
                yield Origin(key, last=-more)
        if entry.numel() == size:
            flat, given = entry.reshape(-1), labels.reshape(-1).to(entry.device)
            changed = flat[flat != given]
            if changed.numel() and bool((changed == changed[0]).all()) and int(changed[0]) != ignore_index:
                yield Origin(key, filled=int(changed[0]))
    marks: dict[tuple[int, ...], list[str]] = {}
    for key, entry in entries.items():
        if entry.dim() > 1 and not may_be_labels(key) and bool(((entry == 0) | (entry == 1)).all()):
            marks.setdefault(tuple(entry.shape), []).append(key)
    for key, entry in whole.items():
        if entry.dim() < 2:
            continue
        for first in (0, 1):
            targets = entry[..., first:].numel()
            masks = [mark for mark in marks.get(tuple(entry.shape), []) if mark != key]
            masks.sort(key=lambda mark: mark == "attention_mask")
            if targets == size:
                yield from (Origin(key, first=first, mask=mask) for mask in masks)
            elif targets == 2 * size and entry.shape[0] % 2 == 0:
                for half in (0, 1):
                    yield Origin(key, first=first, half=half)
                    yield from (Origin(key, first=first, mask=mask, half=half) for mask in masks)


def num_objects(batch: Mapping[str, Any]) -> list[int] | None:
    """The boxes or masks of each row: of labels that are a list of {"class_labels": (n,), ...}, or of a list of class_labels."""
    labels = batch.get("labels")
    if isinstance(labels, (list, tuple)) and all(isinstance(row, Mapping) and "class_labels" in row for row in labels):
        return [len(row["class_labels"]) for row in labels]
    classes = batch.get("class_labels")
    if isinstance(classes, (list, tuple)) or (isinstance(classes, torch.Tensor) and classes.dim() == 2):
        return [len(row) for row in classes]
    return None


def num_rows(batch: Mapping[str, Any]) -> int:
    """The rows of a micro-batch: the size of its first entry that has any. A list of examples has one for each."""
    if batch and all(isinstance(value, Mapping) for value in batch.values()):
        return len(batch)
    for value in batch.values():
        if isinstance(value, (list, tuple)):
            return len(value)
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return 0


def entries_of(batch: Any) -> Mapping[str, Any]:
    """The entries of a batch of any kind by name: of a mapping, a tuple or list, a dataclass or another object."""
    if isinstance(batch, Mapping):
        return batch
    if hasattr(batch, "_asdict"):
        return batch._asdict()
    if isinstance(batch, (list, tuple)):
        return {f"entry {i}": value for i, value in enumerate(batch)}
    if isinstance(batch, torch.Tensor):
        return {"entry": batch}
    return vars(batch) if hasattr(batch, "__dict__") else {}


def like(batch: Any, entries: Mapping[str, Any]) -> Any:
    """A batch of the kind of another, with these entries."""
    if hasattr(batch, "_make"):
        return batch._make(entries.values())
    return type(batch)(entries.values()) if isinstance(batch, (list, tuple)) else dict(entries)


def may_be_labels(key: Any) -> bool:
    """Whether an entry of this name may hold labels; the entries of a tuple have no names."""
    return isinstance(key, str) and ("label" in key or "target" in key or key.startswith("entry"))


def whole(batch: Any) -> dict[str, Any]:
    """The entries of a batch that is going to be sharded along the sequence, in place: copies of all.

    Labels that are shifted before they are sharded are there as Trainer makes them where the batch has none.
    """
    entries = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entries_of(batch).items()}
    labels = entries.get("labels")
    if "shift_labels" not in entries and isinstance(labels, torch.Tensor) and labels.dim():
        entries["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return entries


def kept(batch: Any) -> dict[str, Any]:
    """The entries of a batch as they are now: those that may hold labels are copied, since a forward may write over them."""
    entries = entries_of(batch)
    copied = {
        key: entries[key].clone()
        for key in filter(may_be_labels, entries)
        if isinstance(entries[key], torch.Tensor) and not entries[key].is_floating_point()
    }
    return {**entries, **copied}


class Counted(NamedTuple):
    """How many labels of an entry count, for the host; see accumloss.count_valid."""

    labels: torch.Tensor
    version: int
    valid: ValidCount

    def is_of(self, labels: torch.Tensor) -> bool:
        """Whether labels are these, and as they were when they were counted. Values are compared where nobody has to wait
        for them: Trainer copies the inputs of ranks on CPUs."""
        if self.labels._version != self.version or self.labels.numel() != labels.numel():
            return False
        if same_memory(self.labels, labels):
            return True
        can_look = not devices.waits(self.labels.device) and not devices.waits(labels.device)
        return can_look and same_values(self.labels, labels)


COUNTED = -100  # what is ignored


def counted(batches: Sequence[Any]) -> list[list[Counted]]:
    """Of each batch of a window the entries that may hold labels, counted before anything runs: by one copy to the host."""
    labels = [
        [value for key, value in entries_of(batch).items() if may_be_labels(key) and _are_classes(value)]
        for batch in batches
    ]
    counts = iter(count_each([value for of_batch in labels for value in of_batch], COUNTED))
    return [[Counted(value, value._version, next(counts)) for value in of_batch] for of_batch in labels]


def _are_classes(value: Any) -> bool:
    is_plain = isinstance(value, torch.Tensor) and not hasattr(value, "placements")
    return is_plain and value.dim() > 0 and value.dtype in (torch.int64, torch.int32)


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and a.data_ptr() == b.data_ptr()


def counted_in_memory(views: Sequence[torch.Tensor], entry: torch.Tensor) -> torch.Tensor | None:
    """How often each element of an entry is in one of these views of it: uint8, of its shape; None: one is no view of it."""
    held = torch.zeros_like(entry, dtype=torch.uint8, memory_format=torch.contiguous_format).flatten()
    for view in views:
        if type(view) is torch.Tensor and not view.numel():
            continue
        ends = ends_in(view, entry)
        if ends is None:
            return None
        held.as_strided(view.shape, view.stride(), ends[0]).add_(1)
    return held.reshape(entry.shape)


def ends_in(view: torch.Tensor, entry: torch.Tensor) -> tuple[int, int] | None:
    """The first and the last element of a contiguous entry that a view of it has; None: it is none, or has none."""
    if type(view) is not torch.Tensor or type(entry) is not torch.Tensor or not view.numel():
        return None
    if view.device != entry.device or view.dtype != entry.dtype or not entry.is_contiguous():
        return None
    if view.untyped_storage().data_ptr() != entry.untyped_storage().data_ptr():
        return None
    first = int(view.storage_offset() - entry.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return (first, last) if 0 <= first <= last < entry.numel() else None


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).to(b.device, b.dtype), b.reshape(-1))
