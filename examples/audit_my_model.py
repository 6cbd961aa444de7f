"""Asks whether gradient accumulation is exact for a model of one's own. `python audit_my_model.py`

The same by the command line: `python -m accumloss audit --factory audit_my_model:make`. Exit status 1 where it is not.
"""

import torch
from torch import nn

import accumloss


class TwoHeads(nn.Module):
    """Any module that returns a loss: here a sum of two terms, which count different things."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Tanh())
        self.tags, self.topic = nn.Linear(16, 5), nn.Linear(16, 3)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, input_ids, labels, topics):
        hidden = self.body(input_ids)
        loss_of_tags = self.loss(self.tags(hidden).flatten(0, 1), labels.flatten())  # a mean over labels
        loss_of_topics = self.loss(self.topic(hidden.mean(1)), topics)  # a mean over rows
        return {"loss": loss_of_tags + 0.3 * loss_of_topics}


def make():
    """The model, and the batches of one optimizer step. Rows of uneven length show the most."""
    torch.manual_seed(0)
    tokens = torch.randint(50, (8, 10))
    lengths = torch.tensor([1, 10, 2, 9, 3, 1, 7, 4])
    labels = (tokens % 5).masked_fill(torch.arange(10) >= lengths[:, None], -100)
    return TwoHeads(), [{"input_ids": tokens, "labels": labels, "topics": tokens[:, 0] % 3}]


if __name__ == "__main__":
    report = accumloss.audit(*make())
    for step in report.steps:
        print(
            f"{step.way:9} {step.split:6} gradient {step.ratio:.4f} of the one batch's, error {step.gradient_error:.0e}"
        )
    print("stock exact:", report.is_exact("stock"))
    print("accumloss exact:", report.is_exact())
    if not report.is_exact():
        print(report.reason, report.remedy)
