"""A GPU that is none: what a head would wait for there, in the order in which the host gets to it."""

from __future__ import annotations

import torch

from accumloss.linear import compute, linear_plan
from accumloss.linear import device as devices


class Gpu:
    """A device that counts when the host waits for it, and not before.

    Attributes:
        order: "count K" where K counts are queued for the host, "wait" where it waits for them, "head N" for the loss of a
            chunk of N rows; and what a test puts in between.
        is_done: whether the device has got to the end of its queue by itself.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self.is_done = False

    def to_host(self, counts):
        self.order.append(f"count {counts.numel()}")
        host, gpu = torch.full_like(counts, -1), self

        class Event:
            def query(self):
                return gpu.is_done

            def synchronize(self):
                gpu.order.append("wait")
                host.copy_(counts)

        return host, Event()


def install(monkeypatch) -> Gpu:
    """Heads plan for an H200 that they may not look into, and drop every row that does not count: not in multiples of 64."""
    gpu = Gpu()
    add = compute.ops.add_cross_entropy_

    def recorded(totals, factor, logits, *args, **kwargs):
        gpu.order.append(f"head {logits.shape[0]}")
        return add(totals, factor, logits, *args, **kwargs)

    def plan(*args, device, **kwargs):
        return linear_plan(*args, device="H200", **kwargs)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(compute, "linear_plan", plan)
    monkeypatch.setattr(compute, "ROWS_ALIGNED", 1)
    monkeypatch.setattr(compute.ops, "add_cross_entropy_", recorded)
    monkeypatch.setattr(devices, "waits", lambda device: True)
    monkeypatch.setattr(devices, "to_host", gpu.to_host)
    return gpu
