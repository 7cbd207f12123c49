"""Every flagfile fits its script; the network is described once per data set, in BASE."""

import json

import pytest

from helpers import ROOT, command, fork_all

SCRIPTS = dict(train_base=['BASE'], PD=['PD'], train_rdd=['RDD', 'RCFD', 'BEST'],
               train_dmd=['DMD'], ddim_eval=['EVAL'])
NETWORK = {'ch', 'ch_mult', 'attn', 'num_res_blocks', 'mean_type', 'img_size', 'conditional',
           'class_num'}
PROGRAM = '''
import json, sys
sys.path.insert(0, {root!r})
import {script}
from runtime import cli
found = {{}}
for file in sys.argv[1:]:
    cli.FLAGS.unparse_flags()
    for flag in cli.own_flags():
        flag.unparse()
    cli.FLAGS(cli.without_foreign_flags(['x', '--flagfile=' + file]))
    cli.check_values()
    found[file] = dict({{flag.name: flag.value for flag in cli.own_flags()}},
                       given=[flag.name for flag in cli.own_flags() if flag.present])
print(json.dumps(found))
'''


@pytest.fixture(scope='module')
def values(tmp_path_factory):
    """{(data set, stage): {flag: value, 'given': names of the flags in the file}}"""
    folder, jobs, found = tmp_path_factory.mktemp('config'), {}, {}
    for script, stages in SCRIPTS.items():
        (folder / f'{script}.py').write_text(PROGRAM.format(root=str(ROOT), script=script))
        jobs[script] = [command([f'{folder}/{script}.py'], *[
            file for stage in stages for file in (ROOT / 'config').glob(f'*_{stage}.txt')])]
    for (code, out, err), in fork_all(jobs).values():
        assert code == 0 and 'note:' not in out, err        # the script has every flag
        for file, flags in json.loads(out).items():
            found[tuple(file.split('/')[-1][:-len('.txt')].split('_'))] = flags
    return found


def test_the_network_comes_from_the_checkpoint(values):
    assert len(values) == len(list((ROOT / 'config').glob('*.txt')))
    for (_, stage), flags in values.items():
        found = NETWORK & set(flags['given'])
        assert found == (NETWORK if stage == 'BASE' else set())


def test_variants_differ_from_rdd_in_their_objective_alone(values):
    same = {'dataset', 'data_root', 'classifier', 'classifier_path', 'base_ckpt', 'lr', 'wd',
            'batch_size', 'temperature', 'feature', 'amp', 'grad_clip', 'ema_decay', 'warmup'}
    variants = [key for key in values if key[1] in ('BEST', 'RCFD')]
    assert len(variants) == 5
    for name, stage in variants:
        flags, rdd = values[name, stage], values[name, 'RDD']
        assert {key: flags[key] for key in same} == {key: rdd[key] for key in same}
        assert flags['loss_type'] == 'none' != rdd['loss_type']
        assert (flags['logits'], flags['logits_weight']) == (
            (True, 10) if stage == 'BEST' else (False, 1))


def test_no_two_files_write_into_one_folder(values):
    folders = [flags['logdir'] for (_, stage), flags in values.items() if stage != 'EVAL']
    assert len(set(folders)) == len(folders) and all(folders)


def test_released_values(values):
    """Rows of the recipes that the paper's code, or RCFD's commands, fix."""
    base, pd, rdd, rcfd = (values['CIFAR10', stage] for stage in ('BASE', 'PD', 'RDD', 'RCFD'))
    assert (base['T'], base['lr'], base['total_steps'], base['dropout']) == (1024, 2e-4, 800000, .1)
    assert (pd['lr'], pd['total_steps'], pd['dropout']) == (5e-5, 10000, 0)
    assert pd['mean_type'] == 'xstart'
    assert (rdd['temperature'], rdd['total_steps'], rdd['loss_type']) == (.9, 20000, 'mp2p')
    assert (rcfd['temperature'], rcfd['total_steps'], rcfd['loss_type']) == (.9, 10000, 'none')
    assert rcfd['alpha'] == rcfd['beta'] == 0
    base, rdd, rcfd = (values['IMAGENET64', stage] for stage in ('BASE', 'RDD', 'RCFD'))
    assert (base['dropout'], base['lr'], base['total_steps']) == (0, 2e-5, 1000000)
    for flags in (rdd, rcfd):
        assert (flags['temperature'], flags['total_steps']) == (.75, 50000)
        assert flags['classifier_path'].endswith('/densenet201_normalize05')
