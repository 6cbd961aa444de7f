"""nn.DataParallel on the CPU: what it does on several GPUs, with threads for its replicas and without copies between devices."""

from __future__ import annotations

import threading
from typing import Any

import torch
import transformers

REPLICAS = 2


class DataParallel(torch.nn.Module):
    """Chunks of the batch, each through a replica of the module in a thread of its own, and the outputs gathered."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        chunks = [scattered(inputs, n) for n in range(REPLICAS)]
        chunks = [chunk for chunk in chunks if all(v.numel() for v in chunk.values() if isinstance(v, torch.Tensor))]
        replicas = [replicate(self.module) for _ in chunks]
        outputs: list[Any] = [None] * len(chunks)
        threads = [threading.Thread(target=call, args=(n, replicas[n], chunks[n], outputs)) for n in range(len(chunks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return gathered(outputs)


def call(n: int, replica: torch.nn.Module, chunk: dict[str, Any], outputs: list[Any]) -> None:
    try:
        outputs[n] = replica(**chunk)
    except Exception as error:
        outputs[n] = error


def scattered(inputs: dict[str, Any], n: int) -> dict[str, Any]:
    """Entries along dimension 0, as they would arrive on the device of a replica: copies."""

    def chunk(value: Any) -> Any:
        chunks = value.chunk(REPLICAS) if isinstance(value, torch.Tensor) and value.dim() else None
        if chunks is None:
            return value
        return chunks[n].clone() if n < len(chunks) else value[:0]

    return {key: chunk(value) for key, value in inputs.items()}


def replicate(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of all modules whose parameters are views of the originals, as torch.nn.parallel.replicate makes them."""
    copies = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, copied in copies.items():
        for name, child in part._modules.items():
            if child is not None:
                copied._modules[name] = copies[child]
        for name, parameter in part._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, parameter.view_as(parameter))  # no longer a Parameter
    return copies[module]


def gathered(outputs: list[Any]) -> Any:
    """Losses side by side, all else along dimension 0."""
    found = {}
    for key, value in outputs[0].items():
        if isinstance(value, torch.Tensor):
            values = [output[key] for output in outputs]
            found[key] = torch.stack(values) if value.dim() == 0 else torch.cat(values)
    return type(outputs[0])(**found)


class OnTwoDevices(transformers.TrainingArguments):
    """Arguments of a machine with two devices."""

    @property
    def n_gpu(self) -> int:
        return REPLICAS
