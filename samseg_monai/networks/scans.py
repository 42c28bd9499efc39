"""Several scans of one slice, each through SAM as a grey image, put together to one prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOGETHER = {
    "mean_logits": "the logits are averaged",
    "mean_probabilities": "the probabilities are averaged, and their logits taken",
    "majority": "where most scans agree, the mean logits of those that do (a draw: as the mean probability says)",
    "union": "an object is where any scan sees one: the largest logits over those of the background",
}


def combined(logits: Tensor, mode: str) -> Tensor:
    """One map of logits out of those of the scans.

    Every mode gives the same for any order of the scans, and for equal scans what one of them gives.

    Args:
        logits: (R, V, C, h, w) of V scans; C is 1 (an object), or the classes with the background as channel 0.
        mode: "mean_logits"; "mean_probabilities"; "majority": the class that most scans vote for, of equally many the
            one of the largest mean probability; "union": foreground wherever any scan has it, of the class that
            exceeds the background most.
    Returns: (R, C, h, w); its decision (logit above 0, or largest) is that of the mode.
    """
    if mode == "mean_logits" or logits.shape[1] == 1:
        return logits.mean(1)
    single = logits.shape[2] == 1
    if mode == "union":
        margin = logits - (0.0 if single else logits[:, :, :1])
        return margin.amax(1)
    classes = torch.cat([torch.zeros_like(logits), logits], 2) if single else logits
    if mode == "mean_probabilities":
        share = torch.logsumexp(classes.log_softmax(2), 1)  # up to a constant, which no softmax sees
        return share[:, 1:] - share[:, :1] if single else share
    votes = classes.argmax(2)  # (R, V, h, w)
    counted = F.one_hot(votes, classes.shape[2]).sum(1).movedim(-1, 1)
    winner = (counted + classes.softmax(2).mean(1)).argmax(1)  # a probability is less than a vote
    agree = (votes == winner[:, None])[:, :, None].to(logits.dtype)
    return (logits * agree).sum(1) / agree.sum(1)
