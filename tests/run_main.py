"""Runs main.py several times in one interpreter: a new one costs seconds.

python tests/run_main.py RUNS.json         as one rank of a launcher
python tests/run_main.py --fork RUNS.json  starts all processes itself, as forks of this interpreter

For a launcher RUNS.json is a list of [ranks, flags]. A rank takes part in the runs on more ranks than its number.
For --fork it is a list of processes [rank or null, output, list as above]. The output is a file for stdout and stderr,
or 'broken pipe' for a pipe without a reader. The exit codes of all processes are printed at the end.
"""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402, F401 (all runs share its imports)


def run_all(runs: list, extra: list[str]) -> None:
    """Runs `python main.py` for each list of flags. A run that fails is the last one."""
    launched = 'RANK' in os.environ
    rank = int(os.environ.get('RANK', 0))
    for ranks, flags in runs:
        if launched:
            os.environ['WORLD_SIZE'] = str(ranks)
            if rank == 0:
                print('== run', flush=True)
        if rank < ranks:
            sys.argv = ['main.py', *extra, *(word.format(rank=rank) for word in flags)]
            runpy.run_path(str(ROOT / 'main.py'), run_name='__main__')


def redirect(output: str) -> None:
    """Makes stdout and stderr a file, or a pipe without a reader."""
    if output == 'broken pipe':
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def fork_all(processes: list) -> None:
    children = []
    for rank, output, runs in processes:
        child = os.fork()
        if not child:
            redirect(output)
            if rank is not None:
                os.environ |= {'RANK': rank, 'LOCAL_RANK': rank}
            return run_all(runs, [])
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == '__main__':
    *extra, path = sys.argv[1:]
    runs = json.loads(Path(path).read_text())
    if extra == ['--fork']:
        fork_all(runs)
    else:
        run_all(runs, extra)  # torch.distributed.launch adds a flag
