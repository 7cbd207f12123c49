"""Commands that scripts refuse, and what each sentence must contain; see test_scripts.py.

RUNS stands for the folder of all runs, NEW for a folder that must not come into being.
"""

import socket

from helpers import BASE, PD, RDD, command
from runtime import checkpoint

CLASSIFIER = 'RUNS/classifier/digits/densenet_small'
COMMANDS = dict(
    BASE=BASE, base=[*BASE, '--logdir=NEW'], pd=[*PD, '--logdir=NEW', '--base_ckpt=RUNS/base'],
    rdd=[*RDD, '--logdir=NEW', '--base_ckpt=RUNS/pd', f'--classifier_path={CLASSIFIER}'])

# name: (found and expected, as a regular expression; command and further words, of which the last
# value of a flag counts)
MISTAKES = dict(
    flag=("Unknown command line flag 'learning_rate'", 'base --learning_rate=1'),
    word=('unexpected word "digits" on the command line; flags are written --name', 'base digits'),
    no_logdir=('--logdir is missing: the folder this run writes to', 'BASE'),
    range=('--temperature=0: 0.0 is not number >= 1e-06', 'rdd --temperature=0'),
    channels=('--ch is 33, expected a multiple of 32', 'base --ch=33'),
    size=('--img_size is 9, expected a multiple of 2: the network halves it 1 times',
          'base --img_size=9'),
    level=(r'--attn is \[1, 2\], expected resolutions from 0 to 1', 'base --attn=2'),
    no_terms=('--nofeature --loss_type none leaves no loss to train with',
              'rdd --nofeature --loss_type=none'),
    contrast=(r'--queue_size 64 is smaller than --contrast_size or --queue_update \(65\)',
              'rdd --contrast_size=65'),
    group=('--relation_group 3 does not divide the 8 images that a process works on',
           'rdd --relation_group=3'),
    parts=('--batch_size 8 cannot be shared out .* --grad_accum 3; choose a multiple of 3',
           'base --grad_accum=3'),
    share_3=('--batch_size 3 cannot be shared out equally over 2 processes', 'base --batch_size=3'),
    small_set=('--batch_size 1500 is more than the 1498 training images of --dataset digits',
               'base --batch_size=1500'),
    until_3=('--until 3 is not reached by halving the steps of .*/base; it has 8 steps',
             'pd --until=3'),
    port=('processes could not meet at 127.0.0.1:.* address already in use', 'base'),
    many_steps=('9 steps are more than the 8 of .*/base; lower', 'pd --teacher_steps=9'),
    model_as_classifier=('base/ckpt.pt is a diffusion checkpoint .*, expected a classifier',
                         'rdd --classifier_path=RUNS/base'),
    no_classifier=('there is no classifier .*/bad/none/ckpt.pt',
                   'rdd --classifier_path=RUNS/bad/none'),
    logdir_is_file=(r'--logdir .*/bad/file cannot be written to \(File exists\)',
                    'base --logdir=RUNS/bad/file'),
    other_run=(r'net_model of the checkpoint in .*/base does not fit .* \(9, 32\), .* \(9, 64\)',
               'base --logdir=RUNS/base --ch=64'),
    own_teacher=('--logdir .*/bad/copy is the folder of the teacher .*, which would be overwritten',
                 'pd --base_ckpt=RUNS/bad/copy --logdir=RUNS/bad/copy'),
    other_queue=(r'memory of the checkpoint in .*/rdd does not fit .* \(64, .* \(70, ',
                 'rdd --logdir=RUNS/rdd --total_steps=9 --queue_size=70'),
    classifier_there=('holds a checkpoint without net_model, so it cannot be continued',
                      f'base --logdir={CLASSIFIER}'))


def jobs(folder, busy):
    """{name: [command for forks.py]}; busy: a socket whose port is in use."""
    launched = dict(
        share_3=dict(ranks=2),
        port=dict(env=dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                           MASTER_PORT=str(busy.getsockname()[1]))))
    found = {}
    for name, (_, text) in MISTAKES.items():
        start, *more = text.split()
        words = [word.replace('RUNS', str(folder)).replace('NEW', f'{folder}/bad/new')
                 for word in (*COMMANDS[start], *more)]
        found[name] = [command(words, **launched.get(name, {}))]
    return found


def make_inputs(folder):
    """The folder bad/, of which a copy of the run base is a part; returns a socket in use."""
    (folder / 'bad/copy').mkdir(parents=True)
    checkpoint.save(folder / 'bad/copy/ckpt.pt', dict(checkpoint.read(folder / 'base'), step=2))
    (folder / 'bad/file').write_text('')
    return socket.create_server(('127.0.0.1', 0))
