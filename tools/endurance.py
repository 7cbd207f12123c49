"""Long checks of training runs, by hand: docs/robustness.md has what they print.

  python tools/endurance.py processes     losses of 20 steps on 1, 2 and 4 processes
  python tools/endurance.py kills         runs killed at random moments end as if they were not
  python tools/endurance.py restarts      torchrun restarts after one of its workers is killed
  python tools/endurance.py compiled      losses of 20 steps with and without --compile
  python tools/endurance.py memory        memory and open files over 5,000 steps of RDD
  python tools/endurance.py precision     scores of the digits chain in float32 and with --amp bf16
All on tiny networks and handwritten digits, on the CPU, in a temporary folder.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ('--dataset=digits --img_size=8 --ch=32 --ch_mult=1 --ch_mult=1 --attn=1 --dropout=0.1 '
           '--num_res_blocks=1 --batch_size=16 --num_workers=0 --sample_size=4 --sample_step=0 '
           '--log_step=1').split()
BASE = ['train_base.py', *NETWORK, '--T=8', '--lr=1e-3', '--warmup=0']
PD = ['PD.py', *NETWORK]
RDD = ['train_rdd.py', *NETWORK, '--queue_size=256', '--queue_update=32',
       '--contrast_size=64', '--relation_group=4', '--classifier=densenet_small']
ENV = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')


def start(words, processes=1, **how):
    """A script in the background; how: `launcher`, words for torchrun, or options of Popen."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                *how.pop('launcher', [])] if processes > 1 or 'launcher' in how else []
    return subprocess.Popen([sys.executable, *launcher, *map(str, words)], cwd=str(ROOT), env=ENV,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            universal_newlines=True, **how)


def run(words, processes=1, **how):
    """What a script printed; it must end well."""
    process = start(words, processes, **how)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def prepare(folder):
    """{name: command} of the three kinds of training, with a teacher and a classifier made."""
    run([*BASE, '--total_steps=200', f'--logdir={folder}/teacher'])
    run(['classifier/train.py', '--model=densenet_small', '--dataset=digits', '--seed=0',
         '--epoch=1', '--max_steps=20', '--num_workers=0', f'--result_path={folder}/classifier'])
    teacher = f'--base_ckpt={folder}/teacher'
    return dict(base=BASE, PD=[*PD, teacher], RDD=[
        *RDD, teacher, f'--classifier_path={folder}/classifier/digits/densenet_small'])


def lines(logdir):
    """The log of a run, as far as it is written."""
    path = Path(logdir) / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processes(folder):
    """The same total batch on 1, 2 and 4 processes: the table of losses."""
    print('| run | step | 1 process | 2 processes | 4 processes | largest difference, 20 steps |')
    print('| :--- | ---: | ---: | ---: | ---: | ---: |')
    for name, command in prepare(folder).items():
        losses = []
        for count in (1, 2, 4):
            logdir = f'{folder}/{name}{count}'
            run([*command, '--total_steps=20', f'--logdir={logdir}'], count)
            losses.append([line['loss'] for line in lines(logdir)])
        worst = max(abs(v / one[0] - 1) for one in zip(*losses) for v in one)
        for step in (1, 10, 20):
            values = ' | '.join(f'{loss[step - 1]:.7g}' for loss in losses)
            print(f'| {name} | {step} | {values} | {worst:.1e} |' if step == 20
                  else f'| {name} | {step} | {values} | |', flush=True)


def compiled(folder):
    """Eager and compiled, the latter on 1 and 2 processes: the losses of 20 steps."""
    print('| run | eager | compiled | 2 processes, compiled | largest difference |')
    print('| :--- | ---: | ---: | ---: | ---: |')
    for name, command in prepare(folder).items():
        losses = []
        for count, more in ((1, []), (1, ['--compile']), (2, ['--compile'])):
            logdir = f'{folder}/{name}{count}{len(more)}'
            run([*command, '--dropout=0', '--total_steps=20', f'--logdir={logdir}', *more], count)
            losses.append([line['loss'] for line in lines(logdir)])
        worst = max(abs(v / one[0] - 1) for one in zip(*losses) for v in one)
        values = ' | '.join(f'{loss[-1]:.7g}' for loss in losses)
        print(f'| {name} | {values} | {worst:.1e} |', flush=True)


def chain(folder, amp, seed):
    """{sampler: (Frechet distance, Inception score)}: demo.py's chain, its teacher shortened."""
    logs = f'{folder}/{amp}{seed}'
    same = [f'--amp={amp}', f'--seed={seed}', '--num_workers=0']
    rdd, pd = '--flagfile=config/DIGITS_RDD.txt', '--flagfile=config/DIGITS_PD.txt'
    run(['train_base.py', '--flagfile=config/DIGITS_BASE.txt', *same, f'--logdir={logs}/64',
         '--total_steps=500'])
    run(['PD.py', pd, *same, f'--base_ckpt={logs}/64', f'--logdir={logs}'])
    run(['PD.py', pd, *same, f'--base_ckpt={logs}/8', f'--logdir={logs}/pd', '--until=0'])
    run(['train_rdd.py', rdd, *same, f'--base_ckpt={logs}/8', f'--logdir={logs}/rdd',
         f'--classifier_path={folder}/digits/densenet_small'])
    found = {}
    for name, where, stride in (('DDIM, 8 steps', '64', 8), ('DDIM, 4 steps', '64', 16),
                                ('PD, 8 steps', '8', 1), ('PD, 4 steps', 'pd', 1),
                                ('RDD, 4 steps', 'rdd', 1)):
        run(['ddim_eval.py', '--flagfile=config/DIGITS_EVAL.txt', *same[:2],
             f'--logdir={logs}/{where}', f'--stride={stride}', f'--fid_cache={folder}/real.npz',
             f'--feature_network={folder}/digits/convnet_small'])
        line = json.loads(Path(f'{logs}/{where}/results.jsonl').read_text().splitlines()[-1])
        found[name] = line['fid'], line['inception_score']
    print(f'{amp}, seed {seed}: {found}', file=sys.stderr, flush=True)
    return found


def precision(folder):
    """The digits chain with three seeds in both precisions, two chains at a time."""
    for model, epochs, seed in (('densenet_small', 8, 0), ('convnet_small', 15, 1)):
        run(['classifier/train.py', f'--model={model}', '--dataset=digits', f'--epoch={epochs}',
             f'--seed={seed}', '--init_lr=0.1', '--num_workers=0', f'--result_path={folder}'])
    run(['score/get_npz.py', '--dataset=digits', '--num_workers=0', '--half=1',
         f'--feature_network={folder}/digits/convnet_small', f'--output={folder}/real.npz'])
    runs = [(amp, seed) for amp in ('bf16', 'none') for seed in (1, 2, 3)]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(runs, pool.map(lambda one: chain(folder, *one), runs)))
    print('| sampler | float32, seeds 1 2 3 | bf16, seeds 1 2 3 | means | deviations |')
    print('| :--- | :--- | :--- | :--- | :--- |')
    for name in found[runs[0]]:
        for i, score in enumerate(('Frechet distance', 'inception score')):
            values = [[found[amp, seed][name][i] for seed in (1, 2, 3)]
                      for amp in ('none', 'bf16')]
            cells = [' '.join(f'{v:.2f}' for v in row) for row in (
                *values, map(statistics.mean, values), map(statistics.stdev, values))]
            print(f'| {name}, {score} | {" | ".join(cells)} |')


def same(a, b, skip=('flags',)):
    """Equal bit by bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a if k not in skip)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def killable(folder):
    """{name: (command that ends in the flag of the folder, what a finished run leaves there)}."""
    steps = ['--total_steps=60', '--save_step=7', '--log_step=1']
    found = {name: ([*command, *steps, '--logdir={}'], run_results)
             for name, command in prepare(folder).items()}
    network = f'--feature_network={folder}/classifier/digits/densenet_small'
    run(['score/get_npz.py', '--dataset=digits', '--num_workers=0', network,
         f'--output={folder}/real.npz'])
    found['classifier'] = (['classifier/train.py', '--model=densenet_small', '--dataset=digits',
                            '--recipe=released', '--seed=3', '--epoch=3', '--batchsize=64',
                            '--num_workers=0', '--log_step=1', '--result_path={}'],
                           classifier_results)
    found['evaluation'] = (['ddim_eval.py', '--num_images=600', network, '--sample_size=4',
                            f'--fid_cache={folder}/real.npz', '--logdir={}'], scores)
    return found


def run_results(folder):
    """Checkpoint and log."""
    return [torch.load(f'{folder}/ckpt.pt', weights_only=True),
            [{k: v for k, v in line.items() if k not in ('images_per_s', 'memory_mb')}
             for line in lines(folder)]]


def classifier_results(folder):
    """Checkpoint."""
    return torch.load(f'{folder}/digits/densenet_small/ckpt.pt', weights_only=True)


def scores(folder):
    """The last line of results; a killed evaluation may have been just done."""
    line = json.loads((Path(folder) / 'results.jsonl').read_text().splitlines()[-1])
    return {k: v for k, v in line.items() if k not in ('images_per_s', 'ckpt')}


def kills(folder, hits=30):
    """SIGKILL, SIGTERM and SIGINT at random moments, until `hits` SIGKILLs met a run."""
    rng, commands, found, seconds = random.Random(0), killable(folder), [], {}

    def command_for(name, logdir):
        if name == 'evaluation':
            Path(logdir).mkdir()
            shutil.copy(f'{folder}/teacher/ckpt.pt', logdir)
        return [word.format(logdir) for word in commands[name][0]]

    for name in commands:
        words, since = command_for(name, f'{folder}/{name}_whole'), time.perf_counter()
        run(words)
        seconds[name] = time.perf_counter() - since
    number = 0
    while found.count(signal.SIGKILL) < hits:
        name = list(commands)[number % len(commands)]
        number += 1
        logdir, story = f'{folder}/{name}_{number}', []
        words = command_for(name, logdir)
        while True:
            process = start(words)
            try:
                process.communicate(timeout=rng.uniform(.4, 1.2) * seconds[name])
                assert process.returncode == 0
                break
            except subprocess.TimeoutExpired:
                kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                process.send_signal(kind)
                process.communicate()
                done = lines(logdir)
                story.append(f'{kind.name} at step {done[-1]["step"]}' if done else kind.name)
                found.append(kind)
        equal = same(*map(commands[name][1], (f'{folder}/{name}_whole', logdir)))
        print(f'{name}: {"; ".join(story) or "not hit"}: {"equal" if equal else "DIFFERENT"}',
              flush=True)
    print(f'{len(found)} signals, {found.count(signal.SIGKILL)} of them SIGKILL, in {number} runs')


def children(pid):
    """Process numbers of the direct children that run a training script."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            if int(stat.read_text().rsplit(')', 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return sorted(found)


def restarts(folder):
    """Two workers under torchrun --max-restarts=3; one of them is killed twice."""
    steps = ['--total_steps=60', '--save_step=7', '--log_step=1']
    command = prepare(folder)['RDD']
    run([*command, *steps, f'--logdir={folder}/whole'], 2)
    process = start([*command, *steps, f'--logdir={folder}/killed'], 2,
                    launcher=['--max-restarts=3'])
    for after in (12, 40):
        while not any(line['step'] >= after for line in lines(f'{folder}/killed')):
            time.sleep(.02)
        victim = random.Random(after).choice(children(process.pid))
        os.kill(victim, signal.SIGKILL)
        print(f'killed worker {victim} after step {lines(f"{folder}/killed")[-1]["step"]}')
        time.sleep(5)
    out, _ = process.communicate()
    print(out if process.returncode else '\n'.join(
        line for line in out.splitlines() if 'at step' in line))
    read = [torch.load(f'{folder}/{name}/ckpt.pt', weights_only=True)
            for name in ('whole', 'killed')]
    print(f'exit code {process.returncode}; checkpoint '
          f'{"equal" if same(*read) else "DIFFERENT"} to that of a run that was not killed')


def memory(folder):
    """Resident memory and open files of a tiny RDD run of 5,000 steps."""
    command = [*prepare(folder)['RDD'], '--total_steps=5000', '--log_step=250', '--save_step=500',
               '--sample_step=500', f'--logdir={folder}/long']
    process, files = start(command), {}
    while process.poll() is None:
        done = lines(f'{folder}/long')
        if done:
            try:
                files.setdefault(done[-1]['step'], len(os.listdir(f'/proc/{process.pid}/fd')))
            except OSError:
                break
        time.sleep(.5)
    process.communicate()
    print('| step | memory (MiB) | open files |\n| ---: | ---: | ---: |')
    curve = [(line['step'], line['memory_mb']) for line in lines(f'{folder}/long')]
    for step, mb in curve:
        print(f'| {step} | {mb:.0f} | {files.get(step, "-")} |')
    warm = [mb for step, mb in curve if step >= 500]
    print(f'after step 500: {min(warm):.0f} to {max(warm):.0f} MiB '
          f'({100 * (max(warm) / min(warm) - 1):.1f} %)')


if __name__ == '__main__':
    checks = dict(processes=processes, compiled=compiled, kills=kills, restarts=restarts,
                  memory=memory, precision=precision)
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        checks[sys.argv[1]](temporary)
