"""The whole method on scikit-learn's handwritten digits, in minutes on a laptop CPU.

  python demo.py          (or `make demo`, which also sets up the environment)
Teacher with 64 steps -> PD 32 -> 16 -> 8 -> 4, 2 and 1 steps, by PD and by the recipe of
config/DIGITS_BEST.txt -> scores.
Runs the same scripts and flagfiles a user calls; every command is printed. Run it again to go on
where it stopped. Ends with a table and summary.png.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOGS = Path('logs/digits')
DONE = LOGS / 'demo.json'           # commands that are finished
SCORER = './classifier/result/digits/convnet_small'

# label, folder of the checkpoint, stride of the sampler
SAMPLERS = [('Teacher, 64 steps', '64', 1),
            ('DDIM, 8 steps', '64', 8), ('DDIM, 4 steps', '64', 16),
            ('DDIM, 2 steps', '64', 32), ('DDIM, 1 step', '64', 64),
            ('PD, 4 steps', 'pd/4', 1), ('PD, 2 steps', 'pd/2', 1), ('PD, 1 step', 'pd/1', 1),
            ('Ours, 4 steps', 'best/4', 1), ('Ours, 2 steps', 'best/2', 1),
            ('Ours, 1 step', 'best/1', 1)]


def stages():
    """[(foreground, background)]: two lists of (what, command) that run side by side.

    Networks this small gain less from more threads than from work of its own for the other half of
    the machine; the first two stages, which every student waits for, have no such work beside
    them. The next stage starts when both lists are done.
    """
    classifier = 'classifier/train.py --dataset digits --num_workers 0 --init_lr 0.1'
    half = f'score/get_npz.py --dataset digits --num_workers 0 --feature_network {SCORER} --half'
    pd = 'PD.py --flagfile ./config/DIGITS_PD.txt'
    score = [(f'score: {label}', 'ddim_eval.py --flagfile ./config/DIGITS_EVAL.txt '
              f'--logdir ./{LOGS}/{folder} --stride {stride} --save_images '
              f'./{LOGS}/{folder}/samples_{stride}.npz') for label, folder, stride in SAMPLERS]
    return [
        ([('teacher with 64 steps', 'train_base.py --flagfile ./config/DIGITS_BASE.txt')], []),
        ([('PD: 64 -> 32 -> 16 -> 8 steps', pd)], []),
        ([('classifier whose features RDD compares', classifier + ' --model densenet_small '
           '--epoch 8 --seed 0'),
          ('8 -> 4 -> 2 -> 1 steps by our recipe',
           'train_rdd.py --flagfile ./config/DIGITS_BEST.txt')],
         [('digit network for scoring alone', classifier + ' --model convnet_small --epoch 15 '
           '--seed 1'),
          ('reference: one half of the real digits', f'{half} 1'),
          ('floor: the other half', f'{half} 2'),
          ('8 -> 4 -> 2 -> 1 steps by PD', pd + f' --base_ckpt ./{LOGS}/8 --logdir ./{LOGS}/pd '
           '--until 1')] + score[5:8]),
        (score[:1], score[1:5] + score[8:])]


def with_keys(plan):
    """The stages with a key per command, (key, what, command), by which a finished one is known."""
    keyed, before = [], ''
    for stage in plan:
        keys = [list(accumulate((command for _, command in chain), fingerprint, initial=before))[1:]
                for chain in stage]
        keyed.append([[(key, *what) for key, what in zip(*pair)] for pair in zip(keys, stage)])
        before = ''.join(key for chain in keys for key in chain)
    return keyed


def fingerprint(before, command):
    """Changes with the command, the text of its flagfile and `before`, the keys it builds on."""
    text = before + command + ''.join(Path(word).read_text() for word in command.split()
                                      if word.startswith('./config/'))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_chain(chain, done, threads, log=None):
    """Run commands one after another, those that are finished left out; stop at a failure.

    Returns the sentence to end with, or None. `threads`: of each command, unless OMP_NUM_THREADS
    is set. `log`: file for the output of a background chain.
    """
    environment = {'OMP_NUM_THREADS': str(threads), **os.environ}
    for key, what, command in chain:
        if key in done:
            continue
        print(f'\n{"in the background: " if log else ""}{what}\n  python {command}', flush=True)
        code = subprocess.call([sys.executable, '-u', *command.split()], stdout=log, stderr=log,
                               env=environment)
        if code:
            return (f'demo.py: error: "python {command}" ended with code {code}'
                    + (f' (output in {log.name})' if log else '')
                    + '; run the demo again to go on from here')
        done.append(key)
        DONE.write_text(json.dumps(done))
    return None


def run_all():
    """Run what is not finished yet; returns the seconds that took."""
    LOGS.mkdir(parents=True, exist_ok=True)
    start, plan = time.time(), with_keys(stages())
    done = json.loads(DONE.read_text()) if DONE.exists() else []
    known = {key for stage in plan for chain in stage for key, _, _ in chain}
    done = [key for key in done if key in known]        # the others have been overwritten
    with open(LOGS / 'background.log', 'a') as log, ThreadPoolExecutor() as pool:
        for number, (foreground, background) in enumerate(plan, 1):
            print(f'\n[{number}/{len(plan)}] {time.time() - start:.0f} s so far', flush=True)
            threads = max(1, min(4, (os.cpu_count() or 2) // (2 if background else 1)))
            other = pool.submit(run_chain, background, done, threads, log)
            problem = run_chain(foreground, done, threads) or other.result()
            if problem:
                sys.exit(problem)
    return time.time() - start


def rows():
    """[(label, NFE, Frechet distance, Inception score)], real data first."""
    from score.compare import compare
    floor, half, other = compare(*[f'stats/digits.train.half{i}.npz' for i in (1, 2)])
    table = [('Real digits, other half', None, floor, other.inception_mean)]
    for label, folder, stride in SAMPLERS:
        lines = (LOGS / folder / 'results.jsonl').read_text().splitlines()
        last = [r for r in map(json.loads, lines) if r['stride'] == stride][-1]
        table.append((label, last['nfe'], last['fid'], last['inception_score']))
    return table, half.num_images


def print_table(table, count):
    print(f'\nScores of {count} images against {count} real digits, by the features of a small '
          f'digit network\ntrained for scoring alone (not the classifier RDD distils with; not '
          f'Inception, so these\nnumbers compare with each other only).\n')
    print('| sampler | NFE | Frechet distance | inception score |')
    print('| :--- | ---: | ---: | ---: |')
    for label, nfe, fid, inception in table:
        print(f'| {label} | {nfe or "-"} | {fid:.2f} | {inception:.2f} |')


def picture(table, path, columns=16, size=60):
    """One row of samples per sampler from the same x_T and labels, beside real digits."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from runtime.data import make_dataset
    from runtime.pictures import classes_in_turn
    real = make_dataset('digits', None, 8, train=True)
    files = [np.load(LOGS / folder / f'samples_{stride}.npz') for _, folder, stride in SAMPLERS]
    chosen = classes_in_turn(files[0]['arr_1'])[:columns]
    real_rows = classes_in_turn(real.labels.numpy())[:columns]
    images = [real.images[real_rows].permute(0, 2, 3, 1).numpy()]
    images += [file['arr_0'][chosen] for file in files]
    left, right, pad = 250, 270, 4
    sheet = Image.new('RGB', (left + columns * (size + pad) + right,
                              len(table) * (size + pad) + pad), 'white')
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for row, ((label, _, fid, inception), tiles) in enumerate(zip(table, images)):
        y = pad + row * (size + pad)
        draw.text((left - 14, y + size / 2), label, 'black', font, anchor='rm')
        for column, tile in enumerate(tiles):
            tile = Image.fromarray(tile).resize((size, size), Image.BICUBIC)
            sheet.paste(tile, (left + column * (size + pad), y))
        text = f'FD {fid:.2f}   IS {inception:.2f}'
        draw.text((left + columns * (size + pad) + 14, y + size / 2), text, 'black', font,
                  anchor='lm')
    sheet.save(path)


def main():
    if sys.argv[1:]:
        print(__doc__.strip())
        known = set(sys.argv[1:]) <= {'--help', '-h'}
        sys.exit(None if known else f'demo.py: error: it takes no words, found {sys.argv[1]}')
    os.chdir(ROOT)
    seconds = run_all()
    table, count = rows()
    print_table(table, count)
    picture(table, 'summary.png')
    print(f'\nsummary.png shows them. {seconds:.0f} s.')


if __name__ == '__main__':
    main()
