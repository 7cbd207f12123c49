"""Commands that scripts refuse, and the reason that each sentence must give; see test_scripts.py.

RUNS stands for the folder of all runs, NEW for a folder that must not come into being.
"""

import os
import socket

import numpy as np
from PIL import Image

from classifier import build_classifier
from helpers import BASE, EVAL, PD, RDD, command
from runtime import checkpoint

CLASSIFIER = 'RUNS/classifier/digits/densenet_small'
THERE = f'--classifier_path={CLASSIFIER}'
TEACHER = '--base_ckpt=RUNS/base'
COMMANDS = dict(
    BASE=BASE, PD=PD, RDD=RDD, base=[*BASE, '--logdir=NEW'], pd=[*PD, '--logdir=NEW'],
    pd_of_base=[*PD, '--logdir=NEW', TEACHER],
    rdd=[*RDD, '--logdir=NEW', '--base_ckpt=RUNS/pd'],
    rdd_there=[*RDD, '--logdir=NEW', '--base_ckpt=RUNS/pd', THERE],
    eval=[*EVAL, '--logdir=RUNS/base', '--fid_cache=RUNS/stats/digits.npz',
          f'--feature_network={CLASSIFIER}'],
    folder=[*BASE, '--logdir=NEW', '--dataset=folder'],
    train=['classifier/train.py', '--result_path=NEW', '--dataset=digits'],
    npz=['score/get_npz.py', '--dataset=digits', '--output=RUNS/bad/new.npz'])

# name: (found and expected, as a regular expression; command and further words)
FLAGS = dict(
    flag=("Unknown command line flag 'learning_rate'", 'base --learning_rate=1'),
    kind=("--batch_size=many: invalid literal for int.* 'many'", 'base --batch_size=many'),
    negative=(r'--batch_size=0: 0 is not an integer in the range \[1, ', 'base --batch_size=0'),
    word=('unexpected word "digits" on the command line; flags are written --name', 'base digits'),
    no_logdir=('--logdir is missing: the folder this run writes to', 'BASE'),
    temperature=('--temperature=0: 0.0 is not number >= 1e-06', 'rdd_there --temperature=0'),
    negative_lr=('--lr=-1: -1.0 is not a non-negative number', 'base --lr=-1'),
    dropout=(r'--dropout=2: 2.0 is not a number in the range \[0.0, 0.999\]', 'base --dropout=2'),
    amp=(r'--amp=fp8: value should be one of <none\|bf16\|auto>', 'base --amp=fp8'),
    one_image=(r'--num_images=1: 1 is not an integer in the range \[2, 100000000\]',
               'eval --num_images=1'),
    channels=(r'--ch is 33, expected a multiple of 32 \(group norm', 'base --ch=33'),
    size=('--img_size is 9, expected a multiple of 2: the network halves it 1 times',
          'base --img_size=9'),
    level=(r'--attn is \[1, 2\], expected resolutions from 0 to 1', 'base --attn=2'),
    no_terms=('--nofeature --loss_type none leaves no loss to train with',
              'rdd_there --nofeature --loss_type=none'),
    contrast=(r'--queue_size 64 is smaller than --contrast_size or --queue_update \(65\)',
              'rdd_there --contrast_size=65'),
    group=('--relation_group 3 does not divide the 8 images that a process works on',
           'rdd_there --relation_group=3'),
    parts=('--batch_size 8 cannot be shared out equally over .*--grad_accum 3; .* multiple of 3',
           'base --grad_accum=3'),
    share_3=('--batch_size 3 cannot be shared out equally over 2 processes', 'base --batch_size=3'),
    until_3=('--until 3 is not reached by halving the steps of .*/base; it has 8 steps',
             'pd_of_base --until=3'),
    stride=('--stride 3 does not divide the 8 steps of the model in .*/base', 'eval --stride=3'),
    port=('processes could not meet at 127.0.0.1:.* address already in use', 'base'))

DATA = dict(
    dataset=('--dataset dogs is unknown; choose one of digits, fashion_mnist, cifar10, imagenet64, '
             'folder', 'base --dataset=dogs'),
    no_images=(r'bad/empty holds no images that can be used \(the class folders dog are empty\)',
               'folder --data_root=RUNS/bad/empty'),
    no_data_root=('--data_root .*/bad/none holds no train images: .* there is no such folder',
                  'folder --data_root=RUNS/bad/none'),
    broken_image=('broken/dog/5.png cannot be read as an image .cannot identify image file',
                  'folder --data_root=RUNS/bad/broken'),
    small_set=('--batch_size 8 is more than the 7 training images of --dataset folder',
               'folder --data_root=RUNS/bad/broken --skip_bad_images'),
    all_bad=('none of the 1 images in .*/bad/unreadable can be read',
             'train --dataset=folder --data_root=RUNS/bad/unreadable --skip_bad_images'))

NO_CHECKPOINT = 'there is no checkpoint .*/bad/none/ckpt.pt.*; give the folder of a finished run'
NO_CLASSIFIER = 'there is no classifier .*/bad/none/ckpt.pt; train one with: python classifier/'
A_CLASSIFIER = 'densenet_small/ckpt.pt is a classifier, not a diffusion checkpoint'
MODELS = dict(
    no_folder=(NO_CHECKPOINT, 'pd --base_ckpt=RUNS/bad/none'),
    cut=('bad/cut/ckpt.pt is truncated or not a checkpoint', 'pd --base_ckpt=RUNS/bad/cut'),
    odd=('bad/odd has 7 sampling steps, which cannot be halved', 'pd --base_ckpt=RUNS/bad/odd'),
    classifier_as_model=(A_CLASSIFIER, f'pd --base_ckpt={CLASSIFIER}'),
    model_as_classifier=('base/ckpt.pt is a diffusion checkpoint .*, expected a classifier',
                         'rdd --classifier_path=RUNS/base'),
    no_classifier=(NO_CLASSIFIER, 'rdd --classifier_path=RUNS/bad/none'),
    classes=('the classifier .*/bad/five.pt has 5 classes, expected 10',
             'rdd --classifier_path=RUNS/bad/five.pt --classifier=convnet_small'),
    other_ch=('--ch is 64 and .*/base/ckpt.pt has 32', 'pd_of_base --ch=64'),
    other_attn=(r'--attn is \[0\] and .*/base/ckpt.pt has \[1\]', 'pd_of_base --attn=0'),
    other_output=('--mean_type is epsilon and .*/base/ckpt.pt was trained with xstart',
                  'eval --mean_type=epsilon'),
    many_steps=('--teacher_steps 9 is more than the 8 steps of .*/base; lower it',
                'pd_of_base --teacher_steps=9'),
    other_steps=('--teacher_steps 3 does not divide the 4 steps of .*/pd',
                 'pd --base_ckpt=RUNS/pd --teacher_steps=3'))

RUN_FOLDERS = dict(
    logdir_is_file=(r'--logdir .*/bad/file cannot be written to \(File exists\)',
                    'BASE --logdir=RUNS/bad/file'),
    other_run=(r'net_model of the checkpoint in .*/base does not fit .* \(9, 32\), .* \(9, 64\)',
               'BASE --logdir=RUNS/base --ch=64'),
    own_teacher=('--logdir .*/bad/copy is the folder of the teacher .*, which would be overwritten',
                 'PD --base_ckpt=RUNS/bad/copy --logdir=RUNS/bad/copy'),
    other_stage=('/pd holds a run with T 4, and this one has 8; choose another --logdir',
                 'BASE --logdir=RUNS/pd'),
    pd_into_rdd=('/of_rdd holds a run with method rdd, and this one has pd; choose another',
                 f'PD {TEACHER} --logdir=RUNS/bad/of_rdd --total_steps=9'),
    other_queue=(r'memory of the checkpoint in .*/rdd does not fit .* \(64, .* \(70, ',
                 f'RDD --base_ckpt=RUNS/pd {THERE} --logdir=RUNS/rdd --total_steps=9 '
                 f'--queue_size=70'),
    classifier_there=('holds a checkpoint without net_model, so it cannot be continued',
                      f'BASE --logdir={CLASSIFIER}'))

STATISTICS = dict(
    no_statistics=('there are no statistics .*/bad/none.npz; make them with: python score/get_npz',
                   'eval --fid_cache=RUNS/bad/none.npz'),
    nan=('bad/nan.npz holds values that are not finite', 'eval --fid_cache=RUNS/bad/nan.npz'))

MISTAKES = dict(FLAGS, **DATA, **MODELS, **RUN_FOLDERS, **STATISTICS)
# what make_inputs leaves in bad/, and test_scripts.py with it
INPUTS = ['broken', 'copy', 'cut', 'empty', 'file', 'five.pt', 'nan.npz', 'odd', 'of_rdd',
          'unreadable']


def jobs(folder, busy_port):
    """{name: [command for forks.py]}; busy_port: a port that is in use."""
    launched = dict(
        share_3=dict(ranks=2),
        port=dict(env=dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                           MASTER_PORT=str(busy_port))))
    found = {}
    for name, (_, text) in MISTAKES.items():
        start, *more = text.split()
        words = [word.replace('RUNS', str(folder)).replace('NEW', new_folder(folder, name))
                 for word in (*COMMANDS[start], *more)]
        found[name] = [command(words, **launched.get(name, {}))]
    return found


def new_folder(folder, name):
    """Where a command would write if it were not refused."""
    return f'{folder}/bad/new_{name}'


def busy_socket():
    """A socket that keeps a port in use."""
    busy = socket.socket()
    busy.bind(('127.0.0.1', 0))
    busy.listen(1)
    return busy


def make_inputs(folder):
    """The folder bad/, from the runs base and pd."""
    bad, base, pd = folder / 'bad', *(checkpoint.read(folder / name) for name in ('base', 'pd'))
    for name, state in dict(
            odd=dict(base, T=7, N=8), copy=dict(base, step=2),
            of_rdd=dict(pd, method='rdd', memory={})).items():
        (bad / name).mkdir(parents=True)
        checkpoint.save(bad / name / 'ckpt.pt', state)
    (bad / 'cut').mkdir()
    (bad / 'cut/ckpt.pt').write_bytes((folder / 'base/ckpt.pt').read_bytes()[:5000])
    checkpoint.save(bad / 'five.pt', dict(model=build_classifier('convnet_small', 5).state_dict(),
                                          name='convnet_small'))
    for name in ('empty', 'broken', 'unreadable'):
        os.makedirs(bad / name / 'dog')
    for i in range(8):
        Image.new('RGB', (8, 8)).save(str(bad / f'broken/dog/{i}.png'))
    for file in ('broken/dog/5.png', 'unreadable/dog/0.png'):
        (bad / file).write_bytes(b'no picture')
    np.savez(str(bad / 'nan.npz'), mu=np.full(144, np.nan), sigma=np.eye(144))
    (bad / 'file').write_text('')
