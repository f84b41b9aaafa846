"""Losses of other methods on the same patch tokens, to compare with: main.py with more relation terms.

    python -m tools.rivals --w-gram 4 --w-sample 0 --w-patch 0 --w-rand 0 …    all other flags are those of main.py

They are no part of main.py. A row of a plan of tools/experiment.py may have their flags: this program then runs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from losses import RELATION_TERMS, RelationTerm, relation_map


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The patch term without negative similarities, which count as 0: tokens (B, N, D_s), (B, N, D_t) → scalar.

    Gram anchoring (DINOv3; Siméoni et al., 2025, https://arxiv.org/abs/2508.10104), with the teacher of the run in
    place of an earlier student.
    """
    return (relation_map(student).clamp(min=0) - relation_map(teacher).clamp(min=0)).square().mean()


def regression_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the teacher's tokens predicted from the student's: (B, N, D_s), (B, N, D_t) → scalar.

    Feature regression (FitNets; Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550). The linear projector is not
    learned over time: it is the best one for all tokens of the batch, in closed form. At the best one the derivative
    with respect to the projector is 0, so it is a constant for the gradient. Each channel of the teacher has mean 0 and
    variance 1 over the batch: the loss is the share of the variance that is not predicted, 0 to 1.
    """
    S, T = (x.flatten(0, 1).float() for x in (student, teacher))
    S, T = S - S.mean(0), T - T.mean(0)
    T = T / (T.std(0, correction=0) + 1e-6)
    with torch.no_grad():
        gram = S.double().mT @ S.double()
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)  # it may be singular
        projector = torch.linalg.solve(gram, S.double().mT @ T.double()).float()
    return (S @ projector - T).square().mean()


RIVALS = {
    'gram': RelationTerm(
        lambda s, t, options: gram_loss(s, t),
        default_weight=0.0,
        help='weight of relations within an image, with negative similarities clipped',
        label='gram',
    ),
    'regress': RelationTerm(
        lambda s, t, options: regression_loss(s, t),
        default_weight=0.0,
        help="weight of the regression of the teacher's tokens",
        label='regression',
    ),
}


@contextmanager
def registered() -> Iterator[None]:
    """The parser and the loss know the rivals."""
    RELATION_TERMS.update(RIVALS)
    try:
        yield
    finally:
        for name in RIVALS:
            del RELATION_TERMS[name]


def program(words: list[str]) -> list[str]:
    """What runs these flags: `main.py`, or this module if one of its flags is among them."""
    flags = {f'--w-{name}' for name in RIVALS}
    uses = any(word.split('=')[0].replace('_', '-') in flags for word in words)
    return ['-m', 'tools.rivals'] if uses else ['main.py']


if __name__ == '__main__':
    import loggers
    import main
    import stopping

    loggers.unbuffer_stdio()
    try:
        with registered():
            main.main()
    except SystemExit:
        stopping.ignore_signals()
        raise
