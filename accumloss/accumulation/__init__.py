"""Exact gradient accumulation for training loops of one's own, on one process or on many.

The items of an optimizer step are not known before its last micro-batch. Each micro-batch therefore back-propagates the
**sum** of its losses, and ``finish()`` multiplies the gradients once, before clipping:

    gradient of the window = sum over micro-batches and ranks of d(loss sum) / N

where N is the number of items (total weight, with class weights) of the window over all ranks. Engines that average
gradients over W ranks have divided by W already, so there the factor is W / N.
"""

from .accumulator import Accumulator

__all__ = ["Accumulator"]
