"""Commands that scripts refuse, each with what the sentence must say; see test_scripts.py.

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
NEW = '--logdir=NEW'
NEW_BASE = [*BASE, NEW]
NEW_PD = [*PD, NEW]
NEW_RDD = [*RDD, NEW, '--base_ckpt=RUNS/pd']
THERE = f'--classifier_path={CLASSIFIER}'
TEACHER = '--base_ckpt=RUNS/base'
EVAL_BASE = [*EVAL, '--logdir=RUNS/base', '--fid_cache=RUNS/stats/digits.npz',
             f'--feature_network={CLASSIFIER}']
FOLDER = '--dataset=folder'
TRAIN = ['classifier/train.py', '--result_path=NEW']
NPZ = ['score/get_npz.py', '--dataset=digits', '--output=RUNS/bad/new.npz']

# name: (what was found and what was expected, as a regular expression; command; words added to it)
FLAGS = dict(
    flag=("Unknown command line flag 'learning_rate'", NEW_BASE, '--learning_rate=1'),
    kind=("--batch_size=many: invalid literal for int.* 'many'", NEW_BASE, '--batch_size=many'),
    negative=(r'--batch_size=0: 0 is not an integer in the range \[1, ', NEW_BASE,
              '--batch_size=0'),
    word=('unexpected word "digits" on the command line; flags are written --name', NEW_BASE,
          'digits'),
    no_logdir=('--logdir is missing: the folder this run writes to', BASE),
    temperature=('--temperature=0.*: expected a number above 0', NEW_RDD, THERE,
                 '--temperature=0'),
    negative_lr=('--lr=-1: -1.0 is not a non-negative number', NEW_BASE, '--lr=-1'),
    steps=('--total_steps=0: 0 is not a positive integer', NEW_BASE, '--total_steps=0'),
    clip=('--grad_clip=-1: -1.0 is not a non-negative number', NEW_BASE, '--grad_clip=-1'),
    dropout=(r'--dropout=2: 2.0 is not a number in the range \[0.0, 0.999\]', NEW_BASE,
             '--dropout=2'),
    amp=(r'--amp=fp8: value should be one of <none\|bf16\|auto>', NEW_BASE, '--amp=fp8'),
    one_image=(r'--num_images=1: 1 is not an integer in the range \[2, 100000000\]', EVAL_BASE,
               '--num_images=1'),
    model=(r'--model=vgg: value should be one of <densenet121\|.*\|convnet_small>', TRAIN,
           '--model=vgg', '--dataset=digits'),
    epoch=('--epoch=0: 0 is not a positive integer', TRAIN, '--dataset=digits', '--epoch=0'),
    split=(r'--half=3: 3 is not an integer in the range \[0, 2\]', NPZ, '--half=3'),
    channels=(r'--ch is 33, expected a multiple of 32 \(group norm', NEW_BASE, '--ch=33'),
    size=('--img_size is 9, expected a multiple of 2: the network halves it 1 times', NEW_BASE,
          '--img_size=9'),
    level=(r'--attn is \[1, 2\], expected resolutions from 0 to 1', NEW_BASE, '--attn=2'),
    no_terms=('--nofeature --loss_type none leaves no loss to train with', NEW_RDD, THERE,
              '--nofeature', '--loss_type=none'),
    contrast=(r'--queue_size 64 is smaller than --contrast_size or --queue_update \(65\)', NEW_RDD,
              THERE, '--contrast_size=65'),
    group=('--relation_group 3 does not divide the 8 images that a process works on', NEW_RDD,
           THERE, '--relation_group=3'),
    parts=('--batch_size 8 cannot be shared out equally over .*--grad_accum 3; .* multiple of 3',
           NEW_BASE, '--grad_accum=3'),
    share_3=('--batch_size 3 cannot be shared out equally over 2 processes', NEW_BASE,
             '--batch_size=3'),
    share_1=('--batch_size 1 cannot be shared out equally over 2 processes', NEW_BASE,
             '--batch_size=1'),
    until_3=('--until 3 is not reached by halving the steps of .*/base; it has 8 steps', NEW_PD,
             TEACHER, '--until=3'),
    stride=('--stride 3 does not divide the 8 steps of the model in .*/base', EVAL_BASE,
            '--stride=3'),
    port=('processes could not meet at 127.0.0.1:.* address already in use', NEW_BASE))

DATA = dict(
    dataset=('--dataset dogs is unknown; choose one of digits, fashion_mnist, cifar10, imagenet64, '
             'folder',
             NEW_BASE, '--dataset=dogs'),
    no_images=(r'bad/empty holds no images that can be used \(the class folders dog are empty\)',
               NEW_BASE, FOLDER, '--data_root=RUNS/bad/empty'),
    no_data_root=('--data_root .*/bad/none holds no train images: .* there is no such folder',
                  NEW_BASE, FOLDER, '--data_root=RUNS/bad/none'),
    broken_image=('broken/dog/5.png cannot be read as an image .cannot identify image file',
                  NEW_BASE, FOLDER, '--data_root=RUNS/bad/broken'),
    small_set=('--batch_size 8 is more than the 7 training images of --dataset folder', NEW_BASE,
               FOLDER, '--data_root=RUNS/bad/broken', '--skip_bad_images'),
    all_bad=('none of the 1 images of --dataset folder can be read', TRAIN, FOLDER,
             '--data_root=RUNS/bad/unreadable', '--skip_bad_images'))

MODELS = dict(
    no_folder=('there is no checkpoint .*/bad/none/ckpt.pt; give the folder of a finished run',
               NEW_PD, '--base_ckpt=RUNS/bad/none'),
    empty_folder=('there is no checkpoint .*/bad/empty/ckpt.pt; give the folder of a finished run',
                  NEW_PD, '--base_ckpt=RUNS/bad/empty'),
    cut=('bad/cut/ckpt.pt is truncated or not a checkpoint', NEW_PD, '--base_ckpt=RUNS/bad/cut'),
    void=('bad/void/ckpt.pt is truncated or not a checkpoint', NEW_PD,
          '--base_ckpt=RUNS/bad/void'),
    odd=('bad/odd has 7 sampling steps, which cannot be halved', NEW_PD,
         '--base_ckpt=RUNS/bad/odd'),
    one_step=('bad/one has 1 sampling steps, which cannot be halved', NEW_PD,
              '--base_ckpt=RUNS/bad/one'),
    classifier_as_model=('densenet_small/ckpt.pt is a classifier, not a diffusion checkpoint',
                         NEW_PD, f'--base_ckpt={CLASSIFIER}'),
    evaluate_classifier=('densenet_small/ckpt.pt is a classifier, not a diffusion checkpoint',
                         EVAL_BASE, f'--logdir={CLASSIFIER}'),
    model_as_classifier=('base/ckpt.pt is a diffusion checkpoint .*, expected a classifier',
                         NEW_RDD, '--classifier_path=RUNS/base'),
    no_classifier=('there is no classifier .*/bad/none/ckpt.pt; train one with: python classifier/',
                   NEW_RDD, '--classifier_path=RUNS/bad/none'),
    network=('there is no classifier .*/bad/none/ckpt.pt; train one with: python classifier/', NPZ,
             '--feature_network=RUNS/bad/none'),
    classes=('the classifier .*/bad/five.pt has 5 classes, expected 10', NEW_RDD,
             '--classifier_path=RUNS/bad/five.pt', '--classifier=convnet_small'),
    other_ch=('--ch is 64 and the network in .*/base/ckpt.pt has 32', NEW_PD, TEACHER, '--ch=64'),
    other_attn=(r'--attn is \[1, 0\] and the network in .*/base/ckpt.pt has \[1\]', NEW_PD,
                TEACHER, '--attn=0'),
    other_output=('--mean_type is epsilon and .*/base/ckpt.pt was trained with xstart', EVAL_BASE,
                  '--mean_type=epsilon'),
    many_steps=('--teacher_steps 9 is more than the 8 steps of .*/base; lower it', NEW_PD, TEACHER,
                '--teacher_steps=9'),
    other_steps=('--teacher_steps 3 does not divide the 4 steps of .*/pd', NEW_PD,
                 '--base_ckpt=RUNS/pd', '--teacher_steps=3'))

RUN_FOLDERS = dict(
    logdir_is_file=(r'--logdir .*/bad/file cannot be written to \(File exists\)', BASE,
                    '--logdir=RUNS/bad/file'),
    other_run=(r'--logdir .*/base holds a run of another network \(.* is \(9, 32\), here .* 64\)\)',
               BASE, '--logdir=RUNS/base', '--ch=64'),
    own_teacher=('--logdir .*/bad/copy is the folder of the teacher .*, which would be overwritten',
                 PD, '--base_ckpt=RUNS/bad/copy', '--logdir=RUNS/bad/copy'),
    other_stage=('pd holds a pd model with 4 steps of 2 .* this run makes a base model with 8 of 1',
                 BASE, '--logdir=RUNS/pd'),
    pd_into_rdd=('of_rdd holds a rdd model with 4 steps .* this run makes a pd model with 4 of 2',
                 PD, TEACHER, '--logdir=RUNS/bad/of_rdd', '--total_steps=9'),
    rdd_into_pd=('/pd holds a pd model with 4 steps .* this run makes a rdd model with 4 of 2',
                 RDD, TEACHER, THERE, '--logdir=RUNS/pd', '--total_steps=9'),
    late_average=('run to be continued was started with another --ema_decay; give the same', PD,
                  TEACHER, '--logdir=RUNS/pd', '--total_steps=9', '--ema_decay=0.5'),
    other_queue=('run to be continued was started with another .*--queue_size,.*; give the same',
                 RDD, '--base_ckpt=RUNS/pd', THERE, '--logdir=RUNS/rdd_whole', '--total_steps=9',
                 '--queue_size=70'),
    classifier_there=('holds a checkpoint without optimiser and step, so it cannot be continued',
                      BASE, f'--logdir={CLASSIFIER}'))

STATISTICS = dict(
    no_statistics=('there are no statistics .*/bad/none.npz; make them with: python score/get_npz',
                   EVAL_BASE, '--fid_cache=RUNS/bad/none.npz'),
    nan=('bad/nan.npz holds values that are not finite', EVAL_BASE,
         '--fid_cache=RUNS/bad/nan.npz'),
    mu_alone=('bad/mu.npz holds mu, expected mu and sigma', EVAL_BASE,
              '--fid_cache=RUNS/bad/mu.npz'),
    statistics_cut=('bad/file is damaged or not an npz file of mu and sigma', EVAL_BASE,
                    '--fid_cache=RUNS/bad/file'))

MISTAKES = dict(FLAGS, **DATA, **MODELS, **RUN_FOLDERS, **STATISTICS)
# what make_inputs leaves in bad/, and test_scripts.py with it
INPUTS = ['broken', 'copy', 'cut', 'empty', 'file', 'five.pt', 'mu.npz', 'nan.npz', 'odd',
          'of_rdd', 'one', 'unreadable', 'void']


def jobs(folder, busy_port):
    """{name: [command for forks.py]}; busy_port: a port that is in use."""
    launched = dict(
        share_3=dict(ranks=2), share_1=dict(ranks=2),
        port=dict(env=dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1',
                           MASTER_PORT=str(busy_port))))
    found = {}
    for name, (_, argv, *more) in MISTAKES.items():
        words = [word.replace('RUNS', str(folder)).replace('NEW', new_folder(folder, name))
                 for word in (*argv, *more)]
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
            odd=dict(base, T=7), one=dict(base, T=1, time_scale=8), copy=dict(base, step=2),
            of_rdd=dict(pd, method='rdd', memory={})).items():
        (bad / name).mkdir(parents=True)
        checkpoint.save(bad / name / 'ckpt.pt', state)
    for name, size in (('cut', 5000), ('void', 0)):
        (bad / name).mkdir()
        (bad / name / 'ckpt.pt').write_bytes((folder / 'base/ckpt.pt').read_bytes()[:size])
    checkpoint.save(bad / 'five.pt', dict(model=build_classifier('convnet_small', 5).state_dict(),
                                          name='convnet_small'))
    for name in ('empty', 'broken', 'unreadable'):
        os.makedirs(bad / name / 'dog')
    for i in range(8):
        Image.new('RGB', (8, 8)).save(str(bad / f'broken/dog/{i}.png'))
    for file in ('broken/dog/5.png', 'unreadable/dog/0.png'):
        (bad / file).write_bytes(b'no picture')
    np.savez(str(bad / 'nan.npz'), mu=np.full(144, np.nan), sigma=np.eye(144))
    np.savez(str(bad / 'mu.npz'), mu=np.zeros(144))
    (bad / 'file').write_text('')
