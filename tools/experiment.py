"""Trains what a plan asks for, several rows with several seeds, and compares the rows with a control.

    python -m tools.experiment plans/digits.yaml                 runs what is missing in runs/digits, and reports
    python -m tools.experiment plans/digits.yaml --report        only the table and the figure of what there is

Every run is main.py in a process of its own, with --resume auto. If the experiment is interrupted, the same command
continues it: finished runs are not repeated, an unfinished one goes on from its newest checkpoint. docs/experiments.md
explains plans and tables.
"""

import argparse
import dataclasses
import difflib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from flag_types import POSITIVE_INT
from flags import get_args_parser
from tools import results, rivals
from tools.parts import PARTS, link_part, write_digits_once
from tools.plans import Plan, Run, check_command, data_folder, make_runs, read_plan
from utils import UsageError, flag_name

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
STOP_SECONDS = 120  # for a stopped run to save its state


def write_state(run: Run, **state: object) -> None:
    """Writes run.json: complete, or not at all."""
    path = run.folder / 'run.json'
    path.with_suffix('.new').write_text(json.dumps({'identity': run.identity, **state}) + '\n')
    path.with_suffix('.new').replace(path)


@dataclass
class Process:
    """A run at work."""

    run: Run
    popen: subprocess.Popen
    output: Path
    offset: int  # in the output, where this start begins
    started: float
    earlier: float  # seconds of earlier starts

    def seconds(self) -> float:
        return self.earlier + time.time() - self.started

    def last_error(self) -> str:
        """What the run said last: the error of main.py if there is one."""
        text = self.output.read_bytes()[self.offset :].decode(errors='replace')
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for mark in ('main.py: error:', 'Error'):
            if found := [line for line in lines if mark in line]:
                return found[-1]
        return lines[-1] if lines else f'no output, exit status {self.popen.returncode}'


def start(run: Run, threads: int) -> Process | None:
    """Starts or continues a run; None if a process of an earlier, killed experiment still works on it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / 'lock', 'a') as lock:
        try:
            # Held by the run as long as it lives, also if this process is killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        state, started = results.read_state(run.folder), time.time()
        earlier = state.get('seconds', 0.0) + unseen_seconds(run, state)
        write_state(run, finished=False, seconds=earlier, started=started)
        path = run.folder / 'output.txt'
        with open(path, 'a') as output:
            offset = output.tell()
            popen = subprocess.Popen(
                results.command(run, sys.executable),
                cwd=ROOT,
                env=os.environ | {'OMP_NUM_THREADS': str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
            )
    return Process(run, popen, path, offset, started, earlier)


def unseen_seconds(run: Run, state: dict) -> float:
    """How long a start worked whose end this tool did not see, by the time of the last line that it printed."""
    output = run.folder / 'output.txt'
    if 'started' not in state or not output.exists():
        return 0.0
    return max(0.0, output.stat().st_mtime - state['started'])


class Experiment:
    """Runs that wait, runs at work, and what became of the others."""

    def __init__(self, plan: Plan, out: Path, runs: list[Run], jobs: int, report_to: TextIO) -> None:
        self.plan, self.out, self.jobs, self.report_to = plan, out, jobs, report_to
        self.total = len(runs)
        self.waiting = [run for run in runs if not self.is_finished(run)]
        self.working: list[Process] = []
        self.failures: dict[str, str] = {}

    @staticmethod
    def is_finished(run: Run) -> bool:
        return bool(results.read_state(run.folder).get('finished'))

    def say(self, text: str) -> None:
        print(text, file=self.report_to, flush=True)

    def run(self, deadline: float) -> bool:
        """Runs all; False if the deadline came first."""
        self.say(f'{self.total - len(self.waiting)} of {self.total} runs are finished; {self.jobs} at a time')
        while self.waiting or self.working:
            if time.monotonic() > deadline:
                self.stop()
                return False
            for process in [process for process in self.working if process.popen.poll() is not None]:
                self.working.remove(process)
                self.end(process)
            self.start_some()
            time.sleep(POLL_SECONDS)
        return True

    def start_some(self) -> None:
        """Starts waiting runs, in their order, while there is room and their teacher is there."""
        for run in list(self.waiting):
            if run.teacher and run.teacher.name in self.failures:
                self.waiting.remove(run)
                self.fail(run, f'its teacher failed ({run.teacher.name})')
            elif run.teacher and not self.is_finished(run.teacher):
                continue
            elif not self.has_room(run):
                return
            elif process := start(run, self.plan.threads):
                self.waiting.remove(run)
                self.working.append(process)

    def has_room(self, run: Run) -> bool:
        used = sum(process.run.ranks for process in self.working)
        return not used or used + run.ranks <= self.jobs

    def end(self, process: Process) -> None:
        """Keeps and prints what a run that has ended came to."""
        run, status, seconds = process.run, process.popen.returncode, process.seconds()
        write_state(run, finished=status == 0, seconds=seconds)
        if status:
            return self.fail(run, process.last_error())
        result = results.read_result(run)
        assert result
        text = f'{run.name}: Acc@1 {result.accuracy:.2f}'
        control = results.read_result(dataclasses.replace(run, folder=self.control_folder(run)))
        if control and run.row not in ('teacher', self.plan.control):
            text += f', {result.accuracy - control.accuracy:+.2f} against {self.plan.control}'
        done = self.total - len(self.waiting) - len(self.working) - len(self.failures)
        self.say(f'{text}, {seconds:.0f} s ({done} of {self.total})')
        results.write_results(self.plan, self.out, self.failures)

    def control_folder(self, run: Run) -> Path:
        return run.folder.parent.parent / self.plan.control / run.folder.name

    def fail(self, run: Run, reason: str) -> None:
        self.failures[run.name] = reason
        self.say(f'{run.name}: failed: {reason}')

    def stop(self) -> None:
        """Ends all runs; each saves its state first."""
        for process in self.working:
            process.popen.terminate()
        for process in self.working:
            try:
                process.popen.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            write_state(process.run, finished=process.popen.returncode == 0, seconds=process.seconds())
        self.working = []


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """SIGTERM ends the tool as SIGINT does: after its runs have saved their states."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Preparation ----------------------------------------------------------------------------------------------------------


def prepare_data(plan: Plan, out: Path, runs: list[Run]) -> None:
    """Writes or links the images of all runs."""
    if plan.data.source == 'digits':
        write_digits_once(out / 'data' / 'digits')
    elif plan.data.source == 'folders':
        for images in dict.fromkeys(run.images for run in runs):
            target = data_folder(plan, out, images)
            assert target
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                link_part(Path(plan.data.path), target, {'train': images, 'val': plan.data.val_images}, plan.data.part)
            except UsageError as error:
                raise UsageError(f'{plan.path}: data: {error}') from error


def check_same_recipes(plan: Plan, out: Path, runs: list[Run]) -> None:
    """Raises UsageError if a run in the folder was made with other flags, ranks or images than the plan has now."""
    for run in runs:
        now = parsed(run.identity)
        before = parsed(results.read_state(run.folder).get('identity', run.identity))
        changed = [f'{key} {before[key]}, now {now[key]}' for key in now if before[key] != now[key]]
        if changed:
            raise plan.error(run.key, f'{run.folder} was made with {changed[0]}; use another --out')


def parsed(identity: list[str]) -> dict[str, object]:
    """The values of all flags of a run, and its ranks and images."""
    with rivals.registered():
        args, others = get_args_parser().parse_known_args(identity)
    return {flag_name(key): value for key, value in vars(args).items()} | {'': ' '.join(others)}


def default_jobs(plan: Plan) -> int:
    """One run per GPU, or as many as the cores carry with the plan's threads."""
    return torch.cuda.device_count() or max(1, results.cores() // plan.threads)


def check_rows(plan: Plan, names: list[str]) -> None:
    for name in names:
        if name not in plan.rows:
            near = difflib.get_close_matches(name, plan.rows, n=1)
            hint = f'did you mean {near[0]}?' if near else f'rows are {", ".join(plan.rows)}'
            raise UsageError(f'--only {name}: no row of {plan.path}; {hint}')


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str):  # type: ignore[no-untyped-def]
        raise UsageError(message.removeprefix('argument '))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser('python -m tools.experiment', description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('plan', metavar='PLAN', help='a YAML file, see plans/')
    parser.add_argument('--out', help='folder for everything (default: runs/ and the name of the plan)')
    parser.add_argument('--data', default='', metavar='PATH', help='the data set, for data.source folders and flags')
    parser.add_argument('--part', choices=PARTS, help='replaces data.part of the plan')
    parser.add_argument('--only', nargs='+', metavar='ROW', help='run only these rows')
    parser.add_argument('--seeds', nargs='+', type=int, metavar='SEED', help='run these seeds instead of the plan')
    parser.add_argument('--epochs', nargs='+', type=POSITIVE_INT, default=[], metavar='N',
                        help='train the students for each of these numbers of epochs')  # fmt: skip
    parser.add_argument('--images-per-class', nargs='+', type=POSITIVE_INT, default=[], metavar='N',
                        help='train them with each of these numbers of images')  # fmt: skip
    parser.add_argument('--jobs', type=int, help='processes at a time (default: one per GPU, or per core)')
    parser.add_argument('--minutes', type=float, help='stop after this time; the same command continues')
    parser.add_argument('--report', action='store_true', help='run nothing; report what is finished')
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f'--jobs {args.jobs}: must be at least 1')
    if args.seeds and (min(args.seeds) < 0 or max(args.seeds) >= 2**63 or len(set(args.seeds)) < len(args.seeds)):
        raise UsageError(f'--seeds {" ".join(map(str, args.seeds))}: must be different numbers of at least 0')
    return args


def load(args: argparse.Namespace) -> tuple[Plan, Path, list[Run]]:
    """The plan, with what the command line changes, the folder, and the runs to make; all commands are checked."""
    data_path = str(Path(args.data).resolve()) if args.data else ''
    plan = read_plan(args.plan, data_path)
    if args.part:
        if plan.data.source != 'folders':
            raise UsageError(f'--part {args.part}: {plan.path} has data.source {plan.data.source}, not folders')
        plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, part=args.part))
    if args.images_per_class and plan.data.source != 'folders':
        raise UsageError(f'--images-per-class: {plan.path} has data.source {plan.data.source}, not folders')
    plan = dataclasses.replace(plan, epochs=sorted({*args.epochs}), images=sorted({*args.images_per_class}))
    if plan.data.source == 'folders' and not args.data and not args.report:
        raise UsageError(f'--data: {plan.path} needs the path of the data set')
    name = Path(plan.path).stem + (f'-{args.part}' if args.part else '')
    out = Path(os.path.relpath(args.out, ROOT) if args.out else Path('runs') / name)
    check_rows(plan, args.only or [])
    runs = list(make_runs(plan, out, args.seeds or plan.seeds, args.only))
    for run in runs:
        check_command(plan, run)
    return plan, out, runs


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if a run failed or time ran out, 2 for a wrong plan or flag."""
    try:
        args = parse(argv)
        os.environ.setdefault('PYTHONUNBUFFERED', '1')
        plan, out, runs = load(args)
        os.chdir(ROOT)  # paths in commands and results begin here
        if not args.report:
            check_same_recipes(plan, out, runs)
            prepare_data(plan, out, runs)
    except UsageError as error:
        print(f'experiment: error: {error}', file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(plan, out, [] if args.report else runs, args.jobs or default_jobs(plan), sys.stdout)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float('inf')
    with signals_as_exits():
        try:
            is_complete = args.report or experiment.run(deadline)
        finally:
            experiment.stop()
    print(f'\n{results.write_results(plan, out, experiment.failures)}\n')
    endings = ('md', 'json', *(('png', 'svg') if results.draw(plan, out) else ()))
    print(f'In {out}: {", ".join(f"{plan.results}.{ending}" for ending in endings)}')
    if not is_complete:
        print('Time is up. The same command continues.')
    return 0 if is_complete and not experiment.failures else 1


if __name__ == '__main__':
    sys.exit(main())
