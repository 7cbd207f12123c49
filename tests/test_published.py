"""What people have from the released code, RCFD and pytorch-ddpm: checkpoints and flagfiles.

A file of each of their formats must sample the images of the network that wrote it, and each of
their flags must act or be named at the start as one that does not.
"""

import functools
import json

import pytest
import torch

from classifier import build_classifier, load_classifier
from diffusion import Diffusion
from formats.load import load_model
from model import UNet
from runtime import checkpoint
from helpers import assert_ran, command, fork_all
from inprocess import make_scorer

TINY = dict(ch=32, ch_mult=[1, 1], attn=[1], num_res_blocks=1, dropout=0.)
GRIDS = dict(base=(8, 1, 'xstart', 'cosine'), student=(2, 4, 'xstart', 'cosine'),
             labelled=(8, 1, 'xstart', 'cosine'), ddpm=(999, 1, 'epsilon', 'linear'))
STRIDES = dict(base=4, student=1, labelled=4, ddpm=333)
DISGUISES = ['plain', 'wrapped', 'legacy', 'cuda', 'all']


@functools.lru_cache(None)
def network(kind, seed=0):
    """A network that answers to its inputs; the one that "was trained"."""
    torch.manual_seed(seed)
    T, time_scale, _, _ = GRIDS[kind]
    unet = UNet(T * time_scale, conditional=kind == 'labelled', **TINY).eval()
    for p in unet.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return unet.requires_grad_(False)


@functools.lru_cache(None)
def contents(kind):
    """(what the released scripts put into a file, the network that is to be used)."""
    net, T, time_scale = network(kind), *GRIDS[kind][:2]
    x_T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    if kind == 'student':
        return dict(net_model=net.state_dict(), x_T=x_T, T=T, time_scale=time_scale), net
    average = network(kind, seed=2)
    state = dict(net_model=net.state_dict(), ema_model=average.state_dict())
    if kind == 'ddpm':
        return dict(state, **training_state(net), step=1, x_T=x_T), average
    return dict(state, x_T=x_T, T=T, time_scale=time_scale), average


def training_state(net):
    """Adam and its schedule after a step, as pytorch-ddpm keeps them."""
    net.tail.requires_grad_(True)
    optim = torch.optim.Adam(net.tail.parameters(), lr=2e-4)
    sched = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: min(step, 5000) / 5000)
    net(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64)).square().sum().backward()
    optim.step()
    sched.step()
    assert sched.state_dict()['lr_lambdas'] == [None]
    return dict(sched=sched.state_dict(), optim=optim.state_dict())


def write(path, state, disguise):
    """Save as parallel networks, torch before 1.6 or a GPU leave it."""
    if disguise in ('wrapped', 'all'):
        state = {key: {'module.' + name: v for name, v in value.items()}
                 if key in ('net_model', 'ema_model', 'model') else value
                 for key, value in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        if disguise in ('cuda', 'all'):
            patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        torch.save(state, str(path),
                   _use_new_zipfile_serialization=disguise not in ('legacy', 'all'))


def labels(kind):
    return torch.tensor([1, 0, 9, 3]) if kind == 'labelled' else None


@functools.lru_cache(None)
def images_of(kind, unet):
    """What a network makes of x_T in the file of its kind."""
    T, time_scale, mean_type, schedule = GRIDS[kind]
    diffusion = Diffusion(T, time_scale, mean_type, schedule=schedule)
    with torch.no_grad():
        return diffusion.sample(unet, contents(kind)[0]['x_T'], STRIDES[kind], y=labels(kind))


@pytest.mark.parametrize('kind, disguise', [
    *(('base', disguise) for disguise in DISGUISES), *((kind, 'all') for kind in GRIDS)])
def test_a_file_samples_the_images_of_its_network(tmp_path, kind, disguise):
    state, writer = contents(kind)
    write(tmp_path / 'ckpt.pt', state, disguise)
    model, expected = load_model(tmp_path), images_of(kind, writer)
    with torch.no_grad():
        found = model.diffusion.sample(model.network, state['x_T'], STRIDES[kind], y=labels(kind))
    assert torch.equal(found, expected) and expected.std() > 0.05 and model.img_size == 8
    other = network(kind, seed=0 if kind != 'student' else 2)      # the average of a base counts
    assert (images_of(kind, other) - expected).abs().mean() > 0.05


@pytest.mark.parametrize('disguise', ['plain', 'all'])
def test_a_classifier_file_classifies_as_its_network(tmp_path, disguise):
    torch.manual_seed(0)
    model, x = build_classifier('densenet_small', 10).eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    write(tmp_path / 'ckpt.pt', dict(model=model.state_dict()), disguise)
    loaded = load_classifier(tmp_path, 'densenet_small', 10)
    assert all(torch.equal(one, two) for one, two in zip(loaded(x), model(x)))


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
FLAGFILES = dict(
    base=[*NETWORK, *MACHINE, *TRAINING, *SCORES, *DEAD, '--T=8', '--time_scale=1', '--dropout=0.1',
          '--loss_type=both', '--lr=2e-4', '--warmup=5000', '--ema_decay=0.9999', '--beta_1=1e-4',
          '--beta_T=0.02'],
    pd=[*NETWORK, *MACHINE, *TRAINING, '--dropout=0.', '--loss_type=x', '--lr=5e-5', '--warmup=0',
        '--ema_decay=0.', '--seed=0'],
    rcfd=[*NETWORK, *MACHINE, *TRAINING, '--dropout=0.', '--lr=5e-5', '--warmup=0', '--seed=0',
          '--ema_decay=0.', '--classifier=convnet_small', '--feature', '--nologits', '--gt=false',
          '--temperature=0.5', '--temp=0.9', '--alpha=0.003', '--beta=0.75', '--loss_type=none',
          *UNREAD],
    eval=[*NETWORK, *SCORES, *DEAD, '--dropout=0.', '--stride=1', '--batch_size=128', '--seed=0',
          '--gpu_id=0,1,2,3', '--local_rank=0', '--num_workers=4'])
@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """The folder of all runs, and (code, output, error) of the commands of `chain`."""
    folder = tmp_path_factory.mktemp('published')
    for name, lines in FLAGFILES.items():
        (folder / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    return folder, fork_all(dict(chain=chain(folder, make_scorer(folder))))['chain']


def flagfile(script, path, *more):
    return command([script], f'--flagfile={path}', *more)


def chain(folder, score):
    """Base, resumed and finished by its own flagfile, PD, RCFD, each evaluated."""
    here = ['--dataset=digits', '--num_workers=0', '--gpu_id=', '--log_step=1']
    own = folder / 'new/base/flagfile.txt'
    first = flagfile('train_base.py', folder / 'base.txt', *here, f'--logdir={folder}/new/base')
    return [
        dict(first, kill_after_save=True),
        flagfile('train_base.py', own), flagfile('train_base.py', own),
        flagfile('ddim_eval.py', own, '--num_images=4', *score),
        flagfile('PD.py', folder / 'pd.txt', *here, f'--logdir={folder}/new/pd',
                 f'--base_ckpt={folder}/new/base'),
        flagfile('train_rdd.py', folder / 'rcfd.txt', *here, f'--logdir={folder}/new/rcfd',
                 f'--base_ckpt={folder}/new/pd', f'--classifier_path={folder}/classifier.pt'),
        flagfile('train_rdd.py', folder / 'new/rcfd/flagfile.txt'),
        flagfile('ddim_eval.py', folder / 'eval.txt', '--gpu_id=', f'--logdir={folder}/new/rcfd',
                 *score)]


def test_old_flagfiles_run(ran):
    """Also that of the own run, which is resumed and then finished."""
    folder, results = ran
    assert_ran(results, [137] + [0] * 7)
    assert 'resuming at step 1;' in results[1][1] and 'is finished: step 2.' in results[2][1]
    for name, nfe, weights in (('base', 8, 'ema_model'), ('rcfd', 2, 'net_model')):
        result = json.loads((folder / f'new/{name}/results.jsonl').read_text())
        assert (result['nfe'], result['num_images'], result['weights']) == (nfe, 4, weights)


def test_flags_without_effect_are_named(ran):
    _, results = ran
    base, _, _, own_eval, pd, rcfd, _, evaluation = (result[1] for result in results)
    for out in (base, pd, rcfd):
        for name in ('num_gpus', 'distributed', 'var_type'):
            assert f'note: --{name} has no effect: ' in out
    left_out = 'the flagfile has flags that this script does not read, ignored: '
    assert left_out + ' '.join(SCORES + DEAD) + ' --beta_1=1e-4 --beta_T=0.02\n' in base
    assert left_out + ' '.join(DEAD) + '\n' in evaluation
    assert left_out not in pd
    assert left_out + ' '.join(UNREAD) + '\n' in rcfd
    assert '--temperature=0.9' in rcfd and '--queue_size=20000' in rcfd
    line, = [line for line in own_eval.splitlines() if left_out in line]
    assert '--lr=0.0002' in line and '--T=8' in line and '--ch=' not in line
    for name in ('fid_use_torch', 'num_workers', 'dropout', 'var_type'):
        assert f'note: --{name} has no effect: ' in evaluation


def test_other_flags_act(ran):
    folder, _ = ran
    log = {name: [json.loads(line) for line in
                  (folder / f'new/{name}/metrics.jsonl').read_text().splitlines()]
           for name in ('base', 'pd', 'rcfd')}
    assert [line['lr'] for line in log['base']] == pytest.approx([2e-4 / 5000, 2 * 2e-4 / 5000])
    assert log['pd'][0]['lr'] == pytest.approx(5e-5, rel=0.5)
    assert {'loss_feature', 'entropy', 'diversity'} <= set(log['rcfd'][0])
    assert 'loss_intra' not in log['rcfd'][0] and 'loss_memory' not in log['rcfd'][0]
    terms = log['rcfd'][0]
    total = terms['loss_feature'] + 0.003 * (0.75 * terms['entropy'] + 0.25 * terms['diversity'])
    assert terms['loss'] == pytest.approx(total, rel=1e-5)
    base = checkpoint.read(folder / 'new/base')
    moved = sum((base['net_model'][key] - value).abs().sum().item()
                for key, value in base['ema_model'].items())
    assert moved > 0 and base['T'] == 8
    assert [checkpoint.read(folder / f'new/{name}')['T'] for name in ('pd', 'rcfd')] == [4, 2]
