"""Published defaults and recipes; every flagfile fits its script, and BASE alone has a network."""

import functools
import runpy
from pathlib import Path

import pytest

from helpers import ROOT, parsing
from runtime import cli

SCRIPTS = {'train_base.py': ['BASE'], 'PD.py': ['PD'], 'train_rdd.py': ['RDD', 'RCFD', 'BEST'],
           'train_dmd.py': ['DMD'], 'ddim_eval.py': ['EVAL'], 'classifier/train.py': [],
           'score/get_npz.py': []}
NETWORK = {'ch', 'ch_mult', 'attn', 'num_res_blocks', 'mean_type', 'img_size', 'conditional',
           'class_num'}
STUDENT = dict(lr=5e-5, wd=0, total_steps=10000, warmup=0, ema_decay=0, dropout=0, grad_clip=1)
IMAGENET64 = dict(temperature=.75, total_steps=50000,
                  classifier_path='./classifier/result/imagenet64/densenet201_normalize05')
PUBLISHED = {       # defaults of the original; recipes of the paper's code and RCFD's commands
    'train_base.py': dict(
        T=1024, time_scale=1, lr=2e-4, wd=0.001, total_steps=800000, warmup=5000, ema_decay=0.9999,
        dropout=0.1, grad_clip=1, loss_type='both', batch_size=128, ch=128, ch_mult=[1, 2, 2, 2],
        attn=[1], num_res_blocks=2, img_size=32, class_num=10, mean_type='xstart', seed=0,
        sample_size=64, sample_step=1000, save_step=1000, grad_accum=1, num_workers=4),
    'PD.py': dict(STUDENT, loss_type='both', until=0, batch_size=128),
    'train_rdd.py': dict(
        STUDENT, loss_type='mp2p', classifier='densenet201', temperature=1, feature=True,
        feature_weight=1, intra_weight=1, intra_temperature=1, relation_group=0, memory_weight=0.1,
        contrast_temperature=0.1, queue_size=20000, queue_update=128, contrast_size=4096,
        queue_layout='pixels', alpha=0, beta=0, logits=False, logits_weight=1, gt=False,
        gt_weight=1),
    'ddim_eval.py': dict(
        stride=1, num_images=50000, fid_use_torch=False, weights='auto', seed=0,
        fid_cache='./stats/cifar10.train.npz', fid_float=False, batch_size=128),
    'classifier/train.py': dict(
        model='resnet18', dataset='cifar10', epoch=300, seed=-1, batch_size=128, lr=0.1, wd=5e-4,
        normalize05=False),
    'score/get_npz.py': dict(dataset='cifar10', batch_size=128, split='train', half=0),
    'CIFAR10_BASE': dict(T=1024, lr=2e-4, total_steps=800000, dropout=.1),
    'CIFAR10_PD': dict(lr=5e-5, total_steps=10000, dropout=0, mean_type='xstart'),
    'CIFAR10_RDD': dict(temperature=.9, total_steps=20000, loss_type='mp2p'),
    'CIFAR10_RCFD': dict(temperature=.9, total_steps=10000, loss_type='none', alpha=0, beta=0),
    'IMAGENET64_BASE': dict(dropout=0, lr=2e-5, total_steps=1000000),
    'IMAGENET64_RDD': IMAGENET64, 'IMAGENET64_RCFD': IMAGENET64}


def define_flags(script):
    """As the script does where it is started."""
    runpy.run_path(script).get('define_flags', lambda: None)()


@pytest.fixture(scope='module')
def values():
    """{script: {flag: default}, flagfile: {flag: value, 'given': names of the flags in it}}"""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for script, stages in SCRIPTS.items():
            with parsing(functools.partial(define_flags, script)) as parse:
                found[script] = {flag.name: flag.default for flag in cli.own_flags()}
                files = [file for stage in stages for file in Path('config').glob(f'*_{stage}.txt')]
                for file in files:
                    parse(f'--flagfile={file}')     # the script has every flag in it
                    cli.check_values()
                    found[file.stem] = {flag.name: flag.value for flag in cli.own_flags()}
                    found[file.stem]['given'] = [
                        flag.name for flag in cli.own_flags() if flag.present]
    return found


@pytest.fixture(scope='module')
def files(values):
    """{(data set, stage): flags} of the flagfiles alone, of all that there are."""
    found = {tuple(name.split('_')): values[name] for name in values if name not in SCRIPTS}
    assert len(found) == len(list((ROOT / 'config').glob('*.txt')))
    return found


@pytest.mark.parametrize('name', list(PUBLISHED))
def test_published_values(values, name):
    assert {flag: values[name][flag] for flag in PUBLISHED[name]} == PUBLISHED[name]


def test_the_network_comes_from_the_checkpoint(files):
    for (_, stage), flags in files.items():
        assert NETWORK & set(flags['given']) == (NETWORK if stage == 'BASE' else set())


def test_variants_differ_from_rdd_in_their_objective_alone(files):
    same = {'dataset', 'data_root', 'classifier', 'classifier_path', 'base_ckpt', 'lr', 'wd',
            'batch_size', 'temperature', 'feature', 'amp', 'grad_clip', 'ema_decay', 'warmup'}
    changed = dict(BEST=('none', True, 10), RCFD=('none', False, 1))
    variants = [key for key in files if key[1] in changed]
    assert len(variants) == 6
    for name, stage in variants:
        flags, rdd = files[name, stage], files[name, 'RDD']
        assert {key: flags[key] for key in same} == {key: rdd[key] for key in same}
        assert changed[stage] == (flags['loss_type'], flags['logits'], flags['logits_weight'])
        assert rdd['loss_type'] == 'mp2p'


def test_no_two_files_write_into_one_folder(files):
    folders = [flags['logdir'] for (_, stage), flags in files.items() if stage != 'EVAL']
    assert len(set(folders)) == len(folders) and all(folders)
