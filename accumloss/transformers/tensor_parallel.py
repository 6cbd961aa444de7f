"""Tensor parallelism of transformers whose head leaves its logits sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

from ..keywords import checked

STYLE = "accumloss_vocabulary"


@checked
def vocabulary_parallel_plan(head: str = "lm_head") -> dict[str, str]:
    """The rule of a tensor-parallel plan by which the head gathers no logits: its output is a DTensor, sharded over the vocabulary.

    The losses that register_with_transformers() installs take such logits, and communicate 16 bytes a row. Every other rule
    of the model's plan stays. For training: what else reads the logits gets a DTensor (``.full_tensor()`` gathers it):

        accumloss.register_with_transformers()
        model = AutoModelForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(tp_size=8, tp_plan=accumloss.vocabulary_parallel_plan())
        )

    Args:
        head: the name of the module that makes the logits, a linear layer.

    Returns:
        ``{head: style}``, for ``tp_plan`` of ``transformers.distributed.DistributedConfig``.

    Raises:
        RuntimeError: a transformers whose tensor parallelism is not by DTensors.

    Examples:
        >>> accumloss.vocabulary_parallel_plan()
        {'lm_head': 'accumloss_vocabulary'}
    """
    try:
        from torch.distributed.tensor import Shard
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel

        style: Any = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    except (ImportError, TypeError) as error:
        import transformers

        raise RuntimeError(
            "vocabulary_parallel_plan: expected a transformers whose tensor parallelism is by DTensors, as that of 5.24, got "
            f"{transformers.__version__}: {error}"
        ) from error
    ALL_PARALLEL_STYLES.register(STYLE, style)
    return {head: STYLE}
