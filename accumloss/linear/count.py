"""How many labels of a micro-batch count, known to the host without a wait: counted when they are fetched, asked for later."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..keywords import checked
from . import device as devices


class _Transfer:
    """Some counts on their way to the host."""

    def __init__(self, counts: torch.Tensor) -> None:  # (k,) int64
        self._host, self._event = devices.to_host(counts)
        self._values: list[int] | None = None

    @property
    def is_there(self) -> bool:
        return self._values is not None or self._event is None or self._event.query()

    def values(self) -> list[int]:
        if self._values is None:
            if self._event is not None:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "count_valid(...): expected the count to be asked for before a CUDA graph is captured, got the first "
                        "question in its capture; call int(count) before: the graph is made for that number of rows"
                    )
                self._event.synchronize()
            self._values = self._host.tolist()
            self._event = None
        return self._values


class ValidCount:
    """What ``count_valid`` returns: ``int(count)`` is the number, and ``num_valid=count`` takes it.

    Whoever asks waits until the device has counted, and for nothing that was queued after that. May be asked again.

    Attributes:
        is_known: whether nobody would wait who asks now.

    Examples:
        >>> count = accumloss.count_valid(torch.tensor([3, -100]))
        >>> int(count), count.is_known
        (1, True)
    """

    def __init__(self, transfer: _Transfer, index: int) -> None:
        self._transfer, self._index = transfer, index

    @property
    def is_known(self) -> bool:
        """Whether nobody would wait who asks now."""
        return self._transfer.is_there

    def __int__(self) -> int:
        return self._transfer.values()[self._index]

    __index__ = __int__

    def __repr__(self) -> str:
        return f"ValidCount({int(self) if self.is_known else 'not known yet'})"


@checked
def count_valid(labels: torch.Tensor, *, ignore_index: int = -100, shift: int = 0) -> ValidCount:
    """Counts the labels that are not ignored, for ``num_valid`` of a head that runs later.

    On CUDA a head that does not know the count computes the logits of ignored rows too: to look at the labels would be to
    wait for all that is queued. Called where the labels are fetched, before the forward, the count is queued behind them
    and copied to pinned memory. When the head asks, the forward is queued as well: the GPU does not run dry.

    Args:
        labels: (..., T) int64 or int32 on any device; on the CPU they are counted at once.
        ignore_index: the label that is ignored.
        shift: that of the loss: the first labels of each row are no targets. 0 counts them too, which is never too few.

    Returns:
        ValidCount, of these labels as they are now.

    Raises:
        TypeError, ValueError: no labels, or a shift that they have no dimension for.

    Examples:
        >>> labels = torch.tensor([[5, -100, 7, -100]])
        >>> count = count_valid(labels, shift=1)
        >>> int(count)
        1
        >>> hidden, weight = torch.randn(1, 4, 8), torch.randn(9, 8)
        >>> accumloss.linear_cross_entropy(hidden, weight, labels, shift=1, num_valid=count).num_items
        tensor(1)
    """
    name = "count_valid"
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, torch.Tensor) else f"a {type(labels).__name__}"
        raise TypeError(f"{name}: expected labels (..., T) of int64 or int32, got {got}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"{name}: expected ignore_index, an int, got {ignore_index!r}")
    if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0 or (shift and not labels.dim()):
        raise ValueError(f"{name}: expected shift >= 0, an int, and labels (..., T) for it, got {shift!r}")
    return count_each([labels[..., shift:] if shift else labels], ignore_index)[0]


def count_each(labels: Sequence[torch.Tensor], ignore_index: int = -100) -> list[ValidCount]:
    """count_valid of each, by one copy to the host for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, each in enumerate(labels):
        by_device.setdefault(each.device, []).append(index)
    found: dict[int, ValidCount] = {}
    for indices in by_device.values():
        transfer = _Transfer(torch.stack([(labels[index] != ignore_index).count_nonzero() for index in indices]))
        found.update((index, ValidCount(transfer, place)) for place, index in enumerate(indices))
    return [found[index] for index in range(len(labels))]
