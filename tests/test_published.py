"""What people have from the released code, RCFD and pytorch-ddpm: checkpoints and flagfiles."""

import json

import pytest
import torch

from diffusion import Diffusion, clean_linear
from formats.load import TABLE, load_model
from helpers import assert_ran, assert_same, command, fork_all, make_scorer
from wiring import random_unet

KINDS = dict(base=Diffusion(8), student=Diffusion(2, 4), labelled=Diffusion(8),
             ddpm=Diffusion(1000, mean_type='epsilon', schedule=clean_linear()))


def network(kind, seed):
    times = 999 if kind == 'ddpm' else KINDS[kind].N
    return random_unet(seed, times, conditional=kind == 'labelled')


def contents(kind, net, average):
    """What the script that trained `net` puts into a file."""
    state = dict(net_model=net.state_dict(), x_T=torch.zeros(4, 3, 8, 8))
    if kind != 'student':
        state['ema_model'] = average.state_dict()
    if kind != 'ddpm':
        return dict(state, T=KINDS[kind].T, time_scale=KINDS[kind].time_scale)
    optim = torch.optim.Adam(net.parameters(), lr=2e-4)
    sched = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: min(step, 5000) / 5000)
    return dict(state, step=1, sched=sched.state_dict(), optim=optim.state_dict())


def write(path, state, form):
    """Save plain, of parallel networks on a GPU, or as torch before 1.6 did that ('old')."""
    with pytest.MonkeyPatch.context() as patch:
        if form != 'plain':
            patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
            state = {key: {f'module.{name}': v for name, v in value.items()}
                     if key in ('net_model', 'ema_model') else value
                     for key, value in state.items()}
        torch.save(state, str(path), _use_new_zipfile_serialization=form != 'old')


@pytest.mark.parametrize('form', ['plain', 'gpu', 'old'])
@pytest.mark.parametrize('kind', list(KINDS))
def test_a_file_gives_its_network_and_schedule(tmp_path, kind, form):
    """The average of a base model, and the weights themselves of a student."""
    net, average = network(kind, seed=0), network(kind, seed=2)
    write(tmp_path / 'ckpt.pt', contents(kind, net, average), form)
    model, used = load_model(tmp_path), net if kind == 'student' else average
    assert model.network.entries['origin'] == tmp_path.name     # so that no licence is assumed
    expected = dict(used.state_dict())
    if kind == 'ddpm':      # its times 0..999 are 1..1000 here
        expected[TABLE] = torch.cat([expected[TABLE][:1], expected[TABLE]])
    assert_same(dict(model.network.state_dict()), expected)
    assert model.diffusion.arguments() == KINDS[kind].arguments() and model.img_size == 8
    assert model.network.conditional == (kind == 'labelled')


# Flagfiles; a comment and both spellings of booleans are in them as people write them

NETWORK = ['# U-Net', '--ch=32', '--ch_mult=1', '--ch_mult=1', '--attn=1', '--num_res_blocks=1',
           '--img_size=8', '--class_num=10', '--conditional=False', '--mean_type=xstart',
           '--var_type=fixedlarge']
MACHINE = ['--gpu_id=0,1,2,3', '--num_gpus=4', '--distributed', '--local_rank=0']
TRAINING = ['--dataset=cifar10', '--wd=0.', '--grad_clip=1.', '--total_steps=2', '--batch_size=4',
            '--num_workers=4', '--sample_size=4', '--sample_step=0', '--save_step=1']
SCORES = ['--num_images=4', '--fid_use_torch', '--fid_cache=./stats/cifar10.train.npz']
DEAD = ['--train', '--noeval', '--eval_step=0', '--parallel=True']
# flags of absl itself, and one that the released script defines as a float and never reads
UNREAD = ['--logtostderr=false', '--v=-1', '--nopdb', '--log_dir=', '--queue_size=0.1']
STUDENT = [*NETWORK, *MACHINE, *TRAINING, '--dropout=0.', '--lr=5e-5', '--warmup=0',
           '--ema_decay=0.', '--seed=0']
FLAGFILES = dict(
    base=[*NETWORK, *MACHINE, *TRAINING, *SCORES, *DEAD, '--T=8', '--time_scale=1', '--dropout=0.1',
          '--loss_type=both', '--lr=2e-4', '--warmup=5000', '--ema_decay=0.9999', '--beta_1=1e-4',
          '--beta_T=0.02'],
    pd=[*STUDENT, '--loss_type=x'],
    rcfd=[*STUDENT, '--classifier=convnet_small', '--feature', '--nologits', '--gt=false',
          '--temperature=0.5', '--temp=0.9', '--alpha=0.003', '--beta=0.75', '--loss_type=none',
          *UNREAD],
    eval=[*NETWORK, *SCORES, *DEAD, '--dropout=0.', '--stride=1', '--batch_size=128', '--seed=0',
          '--gpu_id=0,1,2,3', '--local_rank=0', '--num_workers=4'])


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """(folder, results) of base, resumed by its own flagfile, PD, RCFD, and two evaluations."""
    folder = tmp_path_factory.mktemp('published')
    for name, lines in FLAGFILES.items():
        (folder / f'{name}.txt').write_text('\n'.join(lines) + '\n')

    def flagfile(script, name, *more):
        return command([script], f'--flagfile={folder}/{name}.txt', *more)

    def train(script, name, *more):
        return flagfile(script, name, '--dataset=digits', '--num_workers=0', '--gpu_id=',
                        '--log_step=1', f'--logdir={folder}/new/{name}', *more)

    score = make_scorer(folder)
    return folder, fork_all(dict(chain=[
        dict(train('train_base.py', 'base'), kill_after_save=True),
        flagfile('train_base.py', 'new/base/flagfile'),
        flagfile('ddim_eval.py', 'new/base/flagfile', '--num_images=4', *score),
        train('PD.py', 'pd', f'--base_ckpt={folder}/new/base'),
        train('train_rdd.py', 'rcfd', f'--base_ckpt={folder}/new/pd',
              f'--classifier_path={folder}/classifier.pt'),
        flagfile('ddim_eval.py', 'eval', '--gpu_id=', f'--logdir={folder}/new/rcfd', *score)
    ]))['chain']


def test_old_flagfiles_run(ran):
    """Also that of the own run, which is resumed."""
    folder, results = ran
    assert_ran(results, [137] + [0] * 5)
    assert 'resuming at step 1;' in results[1][1]
    for name, nfe, weights in (('base', 8, 'ema_model'), ('rcfd', 2, 'net_model')):
        result = json.loads((folder / f'new/{name}/results.jsonl').read_text())
        assert (result['nfe'], result['num_images'], result['weights']) == (nfe, 4, weights)


def test_flags_without_effect_are_named(ran):
    _, results = ran
    base, _, own_eval, pd, rcfd, evaluation = (result[1] for result in results)
    for name in ('num_gpus', 'distributed', 'var_type'):
        assert all(f'note: --{name} has no effect: ' in out for out in (base, pd, rcfd)), name
    for name in ('fid_use_torch', 'num_workers', 'dropout', 'var_type'):
        assert f'note: --{name} has no effect: ' in evaluation, name
    left_out = 'the flagfile has flags that this script does not read, ignored: '
    assert left_out + ' '.join(SCORES + DEAD) + ' --beta_1=1e-4 --beta_T=0.02\n' in base
    assert left_out + ' '.join(DEAD) + '\n' in evaluation
    assert left_out + ' '.join(UNREAD) + '\n' in rcfd
    assert left_out not in pd
    line, = [line for line in own_eval.splitlines() if left_out in line]
    assert '--lr=0.0002' in line and '--T=8' in line and '--ch=' not in line


def test_other_flags_act(ran):
    folder, results = ran
    base, pd, rcfd = (json.loads((folder / f'new/{name}/metrics.jsonl').read_text().split('\n')[0])
                      for name in ('base', 'pd', 'rcfd'))
    assert base['lr'] == pytest.approx(2e-4 / 5000) and pd['lr'] == pytest.approx(5e-5)
    total = rcfd['loss_feature'] + 0.003 * (0.75 * rcfd['entropy'] + 0.25 * rcfd['diversity'])
    assert rcfd['loss'] == pytest.approx(total, rel=1e-5)
    assert '--temperature=0.9' in results[4][1] and '--queue_size=20000' in results[4][1]
