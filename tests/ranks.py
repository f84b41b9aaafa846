"""The criterion on several ranks, or in one process with the images of all ranks.

`python tests/ranks.py FOLDER` runs all `CASES` on two ranks and on three. It writes one file per world size and rank.
"""

import sys
from pathlib import Path

import torch
import torch._dynamo  # DistributedDataParallel needs it; imported once, before the fork
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
from losses import FUSED_PARTS, ManifoldDistillationLoss

B, N, D_S, D_T, C = 2, 5, 6, 9, 4
TERMS = ('sample', 'patch', 'rand', 'full')
# name: α, the relation terms that are on, dtype of the tokens
CASES = {f'{term} alone': (1, (term,), torch.float32) for term in TERMS}
CASES |= {f'all, alpha {a}': (a, TERMS, torch.float32) for a in (0, 1)}
CASES |= {f'all, {str(dtype)[6:]}': (1, TERMS, dtype) for dtype in (torch.bfloat16, torch.float64)}
CASES['fused'] = (1, TERMS, torch.float32)


class Student(nn.Module):
    """Two blocks and a head: (B, N, 7) → logits, the same logits for KD, tokens of both blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, D_S), nn.Linear(D_S, D_S), nn.Linear(D_S, C)

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        one = self.first(x)
        two = self.second(one.tanh())
        logits = self.head(two.mean(dim=1))
        return logits, logits, (one.to(dtype), two.to(dtype))


def batch(world: int) -> tuple[Tensor, tuple, Tensor]:
    """Inputs, output of the teacher, and classes, for the images of all ranks."""
    torch.manual_seed(world)
    images = world * B
    tokens = tuple(torch.randn(images, N, D_T) + torch.randn(D_T) for _ in range(2))
    return torch.randn(images, N, 7), (torch.randn(images, C), None, tokens), torch.randint(C, (images,))


def run(case: str, world: int, rank: int | None) -> dict[str, Tensor]:
    """Each term, and the gradient of their sum at each parameter, on one rank or (None) with the images of all."""
    alpha, terms, dtype = CASES[case]
    torch.manual_seed(0)
    student = Student().to(torch.promote_types(dtype, torch.float32))
    wrapped = student if rank is None else DistributedDataParallel(student)
    # The sampler deals the images out to the ranks one by one.
    own = slice(None) if rank is None else slice(rank, None, world)
    inputs, (logits, _, tokens), classes = batch(world)
    kind = next(student.parameters()).dtype
    teacher_out = (logits[own].to(kind), None, tuple(x[own].to(dtype) for x in tokens))
    weights = {f'w_{term}': float(term in terms) for term in TERMS}
    fused = FUSED_PARTS if case == 'fused' else ()
    # In one process without a process group the three terms would be fused, and draw other tokens.
    fused = fused[1:] if rank is None else fused
    criterion = ManifoldDistillationLoss(
        nn.CrossEntropyLoss(), 'soft', alpha=alpha, relations='global', K=world * B * N // 2, fused=fused, **weights
    )
    student_out = wrapped(inputs[own].to(kind), dtype)
    found = criterion(student_out, teacher_out, classes[own], torch.Generator().manual_seed(5))
    sum(found.values()).backward()
    return {name: value.detach() for name, value in found.items()} | {
        f'gradient of {name}': parameter.grad for name, parameter in student.named_parameters()
    }


def run_rank(rank: int, folder: Path) -> None:
    for world in (2, 3):
        if rank >= world:
            continue
        dist.init_process_group('gloo', init_method=f'file://{folder}/init{world}', rank=rank, world_size=world)
        torch.save({case: run(case, world, rank) for case in CASES}, folder / f'{world}-{rank}.pt')
        dist.barrier()
        dist.destroy_process_group()


if __name__ == '__main__':
    torch.set_num_threads(1)
    # Forks need neither the imports nor the slow exit of an interpreter of their own.
    torch.multiprocessing.start_processes(run_rank, args=(Path(sys.argv[1]),), nprocs=3, start_method='fork')
