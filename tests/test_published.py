"""What people have from the released code, RCFD and pytorch-ddpm: checkpoints and flagfiles.

A file of each of their formats must sample the images of the network that wrote it, and each of
their flags must act or be named at the start as one that does not.
"""

import functools
import json
import pickle

import numpy as np
import pytest
import torch

from classifier import build_classifier, load_classifier
from diffusion import Diffusion
from model import UNet
from runtime import checkpoint, models, seeding
from runtime.pictures import to_uint8
from score import save_statistics
from score.reference import Statistics
from helpers import command, fork_all

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


def sampled(file, stride, y):
    """Images from a file alone."""
    state = checkpoint.read(file)
    unet, _ = models.build_unet(state, file)
    T, time_scale, schedule, mean_type = models.grid(
        state, models.architecture(unet.state_dict()))
    diffusion = Diffusion(T, time_scale, mean_type or 'xstart', schedule=schedule)
    with torch.no_grad():
        return diffusion.sample(unet.eval(), state['x_T'], stride, y=y)


@pytest.mark.parametrize('disguise', DISGUISES)
@pytest.mark.parametrize('kind', list(GRIDS))
def test_a_file_samples_the_images_of_its_network(tmp_path, kind, disguise):
    state, writer = contents(kind)
    write(tmp_path / 'ckpt.pt', state, disguise)
    found, expected = sampled(tmp_path, STRIDES[kind], labels(kind)), images_of(kind, writer)
    assert torch.equal(found, expected) and expected.std() > 0.05
    other = network(kind, seed=0 if kind != 'student' else 2)      # the average of a base counts
    assert (images_of(kind, other) - expected).abs().mean() > 0.05


@pytest.mark.parametrize('disguise', DISGUISES)
def test_a_classifier_file_classifies_as_its_network(tmp_path, disguise):
    torch.manual_seed(0)
    model, x = build_classifier('densenet_small', 10).eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    write(tmp_path / 'ckpt.pt', dict(model=model.state_dict()), disguise)
    loaded = load_classifier(tmp_path, 'densenet_small', 10)
    assert all(torch.equal(one, two) for one, two in zip(loaded(x), model(x)))


@pytest.mark.parametrize('disguise', ['cuda', 'all'])
def test_files_from_a_gpu_say_so(tmp_path, disguise):
    """The files above are no plain CPU files: torch itself would look for a GPU."""
    file, places = tmp_path / 'ckpt.pt', set()
    write(file, contents('student')[0], disguise)
    torch.load(file, lambda storage, place: places.add(place) or storage, weights_only=True)
    assert places == {'cuda:0'}
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match='CUDA'):
            torch.load(file, weights_only=True)


def test_grid_of_pytorch_ddpm(capsys):
    state, _ = contents('ddpm')
    arch = models.architecture(state['ema_model'])
    T, time_scale, schedule, mean_type = models.grid(state, arch)
    assert (T, time_scale, schedule, mean_type) == (999, 1, 'linear', 'epsilon')
    assert 'linear schedule' in capsys.readouterr().out
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))       # beta_1, beta_T, T of its flags
    diffusion = Diffusion(T, time_scale, mean_type, schedule=schedule)
    assert np.allclose(diffusion.alpha ** 2, alpha_bar, rtol=1e-12)
    assert diffusion.times(333) == [999, 666, 333, 0]
    assert len(state['ema_model']['time_embedding.timembedding.0.weight']) == len(alpha_bar)


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
# every flag of the released scripts (T to time_scale: base; stride to fid_cache: evaluation)
RELEASED = set('''dataset ch ch_mult attn num_res_blocks dropout T time_scale mean_type var_type
    loss_type lr wd grad_clip total_steps warmup ema_decay img_size batch_size num_workers
    conditional class_num gpu_id num_gpus distributed local_rank sample_size sample_step save_step
    seed classifier temperature feature logits gt queue_size stride num_images fid_use_torch
    fid_cache'''.split())


def test_the_flagfiles_have_every_flag():
    words = [line[2:].split('=')[0] for lines in FLAGFILES.values() for line in lines]
    assert RELEASED <= {word[2:] if word.startswith('no') else word for word in words}


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """The folder of all runs and what the scripts said, {name: [(code, out, err), ..]}."""
    folder = tmp_path_factory.mktemp('published')
    for name, lines in FLAGFILES.items():
        (folder / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    checkpoint.save(folder / 'classifier.pt', dict(
        model=build_classifier('convnet_small', 10).state_dict(), name='convnet_small'))
    save_statistics(folder / 'stats.npz', Statistics(np.zeros(64), np.eye(64)))
    for kind in GRIDS:
        (folder / kind).mkdir()
        write(folder / kind / 'ckpt.pt', contents(kind)[0], 'all')
    jobs = dict(chain=chain(folder), **scored(folder))
    return folder, fork_all(jobs)


def flagfile(script, path, *more):
    return command([script], f'--flagfile={path}', *more)


def chain(folder):
    """Base, resumed and finished by its own flagfile, PD, RCFD, each evaluated."""
    here = ['--dataset=digits', '--num_workers=0', '--gpu_id=', '--log_step=1']
    own = folder / 'new/base/flagfile.txt'
    score = [f'--fid_cache={folder}/stats.npz', f'--feature_network={folder}/classifier.pt']
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


def scored(folder):
    """Published checkpoints through the scripts."""
    score = [f'--fid_cache={folder}/stats.npz', f'--feature_network={folder}/classifier.pt',
             '--num_images=4']
    jobs = {kind: [command(['ddim_eval.py'], f'--logdir={folder}/{kind}', *score,
                           f'--stride={STRIDES[kind]}', f'--save_images={folder}/{kind}.npz')]
            for kind in ('base', 'student', 'ddpm')}
    one = folder / 'student/ckpt.pt'
    bad = dict(
        ddpm_stride=('ddim_eval.py', f'--logdir={folder}/ddpm', '--stride=100', *score),
        ddpm_pd=('PD.py', '--dataset=digits', f'--base_ckpt={folder}/ddpm', '--mean_type=epsilon'),
        other_ch=('ddim_eval.py', f'--logdir={one}', '--ch=64', *score),
        other_blocks=('ddim_eval.py', f'--logdir={one}', '--num_res_blocks=3', *score),
        other_labels=('ddim_eval.py', f'--logdir={one}', '--conditional', *score),
        other_size=('ddim_eval.py', f'--logdir={one}', '--img_size=16', *score))
    jobs.update({name: [command(case, f'--logdir={folder}/none') if case[0] == 'PD.py' else
                        command(case)] for name, case in bad.items()})
    return jobs


def test_old_flagfiles_run(ran):
    _, results = ran
    codes = [result[0] for result in results['chain']]
    assert codes == [137] + [0] * 7, [result[2] for result in results['chain'] if result[0]]
    assert not any('Traceback' in result[2] for result in results['chain'])


def test_flags_without_effect_are_named(ran):
    _, results = ran
    base, _, _, own_eval, pd, rcfd, _, evaluation = (result[1] for result in results['chain'])
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


def test_own_flagfile_resumes_then_is_finished(ran):
    folder, results = ran
    _, resumed, finished, _, _, _, rdd_finished, _ = (result[1] for result in results['chain'])
    assert 'resuming at step 1;' in resumed and 'is finished: step 2.' in finished
    assert 'is finished: step 2.' in rdd_finished
    steps = [json.loads(line)['step']
             for line in (folder / 'new/base/metrics.jsonl').read_text().splitlines()]
    assert steps == [1, 2]


def test_flagfiles_evaluate(ran):
    folder, _ = ran
    base, rcfd = (json.loads((folder / f'new/{name}/results.jsonl').read_text())
                  for name in ('base', 'rcfd'))
    assert (base['nfe'], base['num_images'], base['weights']) == (8, 4, 'ema_model')
    assert (rcfd['nfe'], rcfd['num_images'], rcfd['weights']) == (2, 4, 'net_model')


@pytest.mark.parametrize('kind', ['base', 'student', 'ddpm'])
def test_ddim_eval_samples_the_images_of_the_network(ran, kind):
    folder, results = ran
    (code, out, err), = results[kind]
    assert code == 0 and ('pytorch-ddpm' in out) == (kind == 'ddpm'), err
    T, time_scale, mean_type, schedule = GRIDS[kind]
    x_T = seeding.noise_of_images(0, torch.arange(4), (3, 8, 8), torch.device('cpu'))
    writer, diffusion = contents(kind)[1], Diffusion(T, time_scale, mean_type, schedule=schedule)
    with torch.no_grad():
        x_0 = diffusion.sample(writer, x_T, STRIDES[kind])
    with np.load(str(folder / f'{kind}.npz')) as file:
        found = torch.from_numpy(file['arr_0']).permute(0, 3, 1, 2).int()
    assert (found - to_uint8(x_0).int()).abs().max() <= 1 and found.float().std() > 5


REFUSALS = dict(
    ddpm_stride=['--stride 100', '999 steps', 'ddpm'],
    ddpm_pd=['/ddpm has 999 sampling steps', 'cannot be halved', '--teacher_steps 128'],
    other_ch=['--ch is 64', 'student/ckpt.pt has 32'],
    other_blocks=['--num_res_blocks is 3', 'student/ckpt.pt has 1'],
    other_labels=['--conditional is True', 'student/ckpt.pt has False'],
    other_size=['--img_size is 16', 'student/ckpt.pt', 'with 8'])


@pytest.mark.parametrize('name', list(REFUSALS))
def test_refusals(ran, name):
    _, results = ran
    (code, _, err), = results[name]
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert all(words in err for words in REFUSALS[name]), err
