"""What is probably meant by words on the command line that no flag takes."""

import difflib

REMOVED = ('--non-finite', '--relation-scale')

# Common names of these flags in other programs.
GUESSES = {
    '--amp-dtype': '--amp --fp16 --bf16 --half --mixed-precision --precision --dtype',
    '--batch-size': '--batch --bs --batchsize --train-batch-size --per-device-train-batch-size -b',
    '--clip-grad': '--grad-clip --max-grad-norm --clip --gradient-clip-val',
    '--accum-steps': '--gradient-accumulation-steps --grad-accum-steps --accumulate-grad-batches --accum-iter',
    '--data-path': '--data --data-dir --root --dataset-path --imagenet --train-dir',
    '--data-set': '--dataset --data-name',
    '--device': '--gpu --cuda --cpu',
    '--distillation-alpha': '--alpha --kd-alpha --kd-weight',
    '--distillation-beta': '--beta',
    '--distillation-tau': '--tau --temperature --kd-temperature -T',
    '--distillation-type': '--distill --distillation --kd --kd-type',
    '--drop-path': '--drop-path-rate --stochastic-depth',
    '--eval': '--evaluate --validate --test --test-only --eval-only',
    '--finetune': '--init --weights --initial-checkpoint',
    '--input-size': '--img-size --image-size --size --resolution',
    '--lr': '--learning-rate --base-lr',
    '--model': '--student --student-model --arch --net',
    '--model-ema': '--ema',
    '--num_workers': '--workers --num-worker -j',
    '--opt': '--optimizer --optim',
    '--output_dir': '--output --out --out-dir --save-dir --save-path --log-dir --logdir --work-dir',
    '--print-freq': '--log-interval --log-freq --print-every',
    '--resume': '--checkpoint --ckpt --load --resume-from --from-checkpoint',
    '--sched': '--scheduler --lr-scheduler --schedule',
    '--s-id': '--student-layers --student-blocks --student-id',
    '--t-id': '--teacher-layers --teacher-blocks --teacher-id',
    '--teacher-model': '--teacher --teacher-arch --kd-model-name',
    '--teacher-path': '--teacher-weights --teacher-checkpoint --teacher-ckpt --teacher-resume',
    '--warmup-epochs': '--warmup --warm-up --warmup-epoch',
    '--weight-decay': '--wd --decay',
}


def explain_unknown(word: str, argv: list[str], counts: dict[str, int | str | None]) -> str:
    """One line about a word that no flag takes: what is meant, if that is clear.

    Args:
        word: the first such word, with dashes for underscores if it is a flag.
        argv: all words of the command line, written in the same way.
        counts: all spellings of all flags, and argparse's `nargs` of each.
    """
    name = word.split('=')[0]
    if name in REMOVED:
        return f'{word}: this flag was removed, see CHANGELOG.md'
    near = nearest_flag(name, [*counts])
    if near:
        return f'{word}: unrecognized argument; did you mean {near}?'
    before = next((flag for flag in reversed(argv[: argv.index(word)]) if flag in counts), '')
    if before and not word.startswith('-'):
        return f'{word}: unrecognized argument; {before} takes {"no" if counts[before] == 0 else "one"} value'
    return f'{word}: unrecognized argument'


def nearest_flag(typed: str, known: list[str]) -> str:
    """The flag that is probably meant by an unknown one, '' if that is not clear."""
    guessed = [flag for flag, words in GUESSES.items() if typed in words.split()]
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.75) if typed.startswith('--') else []
    return next(iter(guessed + close), '')
