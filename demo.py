"""The whole method on scikit-learn's handwritten digits, in minutes on a laptop CPU.

  python demo.py          (or `make demo`, which also sets up the environment)
Teacher with 64 steps -> PD 32 -> 16 -> 8 -> 4, 2 and 1 steps, by PD and by the recipe of
config/DIGITS_BEST.txt; from PD's student of 1 step on by DMD -> scores. Runs the scripts and
flagfiles that you would call yourself, and prints every command. Run it again to go on where it
stopped. Everything it writes is in ./demo/, the tables and summary.png as well; `make clean`
removes that folder.
"""

import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime import cli
from runtime.commands import Commands

DEMO = Path('demo')
CLASSIFIER = ('classifier/train.py --dataset digits --num_workers 0 --init_lr 0.1 '
              '--result_path ./demo/classifier')
NETWORK = '--feature_network ./demo/classifier/digits/convnet_small'
MEASURE = f'score/get_npz.py --dataset digits --num_workers 0 {NETWORK}'
ROWS = [('DDIM', 64), ('PD+DMD', 1), ('Ours', 1), ('PD', 1), ('Ours', 2), ('PD', 2), ('Ours', 4),
        ('PD', 4), ('DDIM', 8), ('DDIM', 4), ('DDIM', 2), ('DDIM', 1)]
SAMPLES = ' '.join(f'"{method}, {T}=./demo/study/{method}/seed0/{T}/samples.npz"'
                   for method, T in ROWS)
# stages: jobs that share the cores, what is shown, and what runs in the background meanwhile
STAGES = [
    (1, ['train_base.py --flagfile ./config/DIGITS_BASE.txt --logdir ./demo/64',
         'PD.py --flagfile ./config/DIGITS_PD.txt --base_ckpt ./demo/64 --logdir ./demo'], []),
    (2, [f'{CLASSIFIER} --model densenet_small --epoch 8 --seed 0'],    # RDD compares its features
     [f'{CLASSIFIER} --model convnet_small --epoch 15 --seed 1',
      f'{MEASURE} --half 1 --output ./demo/half1.npz',      # the reference
      f'{MEASURE} --half 2 --output ./demo/half2.npz']),    # the lowest distance to be expected
    (2, ['study.py --config DIGITS --base_ckpt ./demo/8 --ddim_ckpt ./demo/64 '
      '--logdir ./demo/study --seeds 1 --jobs 2 --methods PD,Ours,DDIM,PD+DMD --baseline DDIM/64 '
      '--method "Ours=train_rdd.py --flagfile ./config/DIGITS_BEST.txt '
      '--classifier_path ./demo/classifier/digits/densenet_small" '
      f'--eval_flags "{NETWORK} --fid_cache ./demo/half1.npz"'], []),
    (1, [f'tools/plot.py --samples --output ./demo/summary.png {SAMPLES}'], [])]


def main():
    os.chdir(str(cli.ROOT))
    DEMO.mkdir(exist_ok=True)
    start = time.time()
    with open(DEMO / 'background.log', 'a') as log, ThreadPoolExecutor() as pool, \
            Commands() as commands:
        for jobs, foreground, background in STAGES:
            other = pool.submit(run, commands, background, jobs, log)
            run(commands, foreground, jobs)
            other.result()
    rows = real_digits()            # below the tables that the study has printed
    table = (DEMO / 'study/table.md').read_text(encoding='utf-8')
    (DEMO / 'table.md').write_text(table + rows, encoding='utf-8')
    print(f'{rows}\nAll tables are in {DEMO}/table.md, images in {DEMO}/summary.png. '
          f'{time.time() - start:.0f} s.')


def run(commands, lines, shares, log=None):
    """Run command lines in turn, on 1 of `shares` parts of the cores; log None: the terminal."""
    threads = max(1, min(4, (os.cpu_count() or 2) // shares))
    for line in lines:
        print(f'\n{"in the background: " if log else ""}python {line}', flush=True)
        code = commands.run(shlex.split(line), stdout=log, stderr=log,
                            env={'OMP_NUM_THREADS': str(threads), **os.environ})
        if code:
            where = f' (output in {log.name})' if log else ''
            raise cli.UserError(f'"python {line}" ended with code {code}{where}; run the demo '
                                f'again to go on from here', code=1)


def real_digits():
    """What the study lacks: the scores of real digits, the other half of them."""
    from score.metrics import frechet_distance, precision_recall
    from score.reference import load_statistics
    half, other = load_statistics(DEMO / 'half1.npz'), load_statistics(DEMO / 'half2.npz')
    floor = frechet_distance(half.mu, half.sigma, other.mu, other.sigma)
    precision, recall = precision_recall(half.features, other.features)
    return (f'\nReal digits, the half that is not the reference: distance {floor:.3f}, Inception '
            f'score {other.inception_mean:.3f}, precision {precision:.3f}, recall {recall:.3f}.\n'
            f'{half.num_images} images each. The features are those of a small digit network that '
            f'is trained for scoring alone,\nso compare these scores with each other only.\n')


if __name__ == '__main__':
    cli.run(main)
