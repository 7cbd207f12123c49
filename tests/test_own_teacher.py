"""A teacher that somebody else trained, through the README's section and the other commands."""

import json
import os
import re

import numpy as np
import pytest
import torch

from classifier import build_classifier
from model import UNet
from runtime import checkpoint, models
from score import save_statistics
from score.reference import Statistics
from helpers import ROOT, assert_ran, command, fork_all
from test_teachers import CELEBAHQ, CIFAR10, TRAINING, diffusers, noise, our_images, pipeline
from test_export import run_card

SECTION = (ROOT / 'README.md').read_text().split('## Distil a teacher you already have\n')[1] \
    .split('\n## ')[0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two pipelines, as the commands of the README name them; statistics and a classifier."""
    diffusers()
    folder = tmp_path_factory.mktemp('teacher')
    (folder / 'config').symlink_to(ROOT / 'config')
    # one of the family of our U-Net, and one that is not
    pipeline(folder / 'ddpm-cifar10-32', attention_head_dim=None)
    pipeline(folder / 'heads', num_class_embeds=10)
    checkpoint.save(folder / 'classifier.pt', dict(
        model=build_classifier('densenet_small', 10).state_dict(), name='densenet_small'))
    size = build_classifier('densenet_small', 10).num_features
    save_statistics(folder / 'stats.npz', Statistics(np.zeros(size), np.eye(size)))
    return folder


def scoring(folder):
    return [f'--fid_cache={folder}/stats.npz', f'--feature_network={folder}/classifier.pt',
            '--num_images=4', '--batch_size=4', '--sample_size=2', '--img_size=8']


def test_the_section_is_short_and_runs_as_written(folder):
    assert len(SECTION.strip().splitlines()) < 25
    lines = [line.split()[1:] for line in SECTION.split('```')[1].strip().splitlines()
             if line.startswith('python')]
    assert [words[0] for words in lines] == ['PD.py', 'score/get_npz.py', 'ddim_eval.py']
    del lines[1]        # it would download CIFAR-10
    more = {'PD.py': [*TRAINING, '--img_size=8'], 'ddim_eval.py': scoring(folder)}
    results = fork_all(dict(run=[command(words, *more[words[0]], cwd=str(folder))
                                 for words in lines]))['run']
    assert_ran(results)
    assert results[0][1].count('note: the student predicts v') == 1     # in the first stage
    for T in (64, 32, 16, 8, 4, 2, 1):
        student = models.load_model(folder / f'logs/mine/{T}')
        assert student.diffusion.times()[::-1] == [round(k * 1000 / T) for k in range(T + 1)]
        assert student.diffusion.mean_type == 'v' and student.facts['origin'] == 'ddpm-cifar10-32'
        assert 'unet_config' not in student.facts       # diffusers is not needed any longer
    assert student.facts['step'] == 2       # twice as long, as for the last two halvings
    result = json.loads((folder / 'logs/mine/1/results.jsonl').read_text())
    assert (result['nfe'], result['T'], result['method']) == (1, 1, 'pd')


def test_a_teacher_is_scored_and_distilled_by_rdd(folder):
    """Through diffusers itself; the flagfile of RDD fits, and every export gives our images."""
    rdd = ['train_rdd.py', '--flagfile=config/TEACHER_RDD.txt', *TRAINING, '--img_size=8',
           '--queue_size=64', '--contrast_size=16', '--queue_update=8', '--teacher_steps=8',
           '--classifier=densenet_small', f'--classifier_path={folder}/classifier.pt',
           f'--base_ckpt={folder}/heads', f'--logdir={folder}/rdd']
    teacher = ['ddim_eval.py', f'--logdir={folder}/heads', '--teacher_steps=128', '--stride=16',
               *scoring(folder)]
    student = ['ddim_eval.py', f'--logdir={folder}/rdd', *scoring(folder)]
    assert_ran(fork_all(dict(run=[command(words, cwd=str(folder))
                                  for words in (teacher, rdd, student)]))['run'])
    result = json.loads((folder / 'heads/results.jsonl').read_text())
    assert (result['T'], result['nfe'], result['stride']) == (128, 8, 16)
    model = models.load_model(folder / 'rdd')
    assert (model.diffusion.times(), model.diffusion.mean_type) == ([1000, 750, 500, 250, 0], 'v')
    assert model.facts['origin'] == 'heads' and 'unet_config' in model.facts


@pytest.mark.parametrize('name', ['ddpm-cifar10-32', 'heads'])
def test_other_formats_give_our_images(folder, monkeypatch, tmp_path, name):
    pytest.importorskip('onnxruntime', reason='optional, see requirements-export.txt')
    words = [f'--logdir={folder}/{name}', '--teacher_steps=4']
    results = fork_all({form: [command(['export.py'], *words, f'--format={form}',
                                       f'--output={tmp_path}/{form}')]
                        for form in ('onnx', 'safetensors', 'diffusers')})
    for result in results.values():
        assert_ran(result)
    model = models.load_model(folder / name, steps=4)
    y = torch.arange(8) % 10 if model.arch['conditional'] else None
    onnx = run_card(tmp_path / 'onnx', monkeypatch)
    wanted = our_images(model, torch.from_numpy(onnx['x_T']), y=y)
    assert (torch.from_numpy(onnx['images']) - wanted).abs().max() < 1e-3
    monkeypatch.syspath_prepend(str(ROOT))
    found = run_card(tmp_path / 'safetensors', monkeypatch)['network']
    t = torch.full((8,), 500)
    with torch.no_grad():
        assert torch.equal(found(noise(8), t, y), model.network(noise(8), t, y))
    for form in results:
        assert f'`{name}`' in (tmp_path / form / 'README.md').read_text()
    assert 'images' in run_card(tmp_path / 'diffusers', monkeypatch)


def test_a_study_of_a_teacher(folder):
    words = ['study.py', '--config=TEACHER', f'--base_ckpt={folder}/heads', '--teacher_steps=4',
             '--methods=DDIM,PD', '--seeds=1', '--until=2', f'--logdir={folder}/study']
    train = ' '.join([*TRAINING, '--img_size=8'])
    words += [f'--train_flags={train}', f'--eval_flags={" ".join(scoring(folder))}']
    assert_ran(fork_all(dict(run=[command(words)]))['run'])
    table = (folder / 'study/table.md').read_text()
    assert re.search(r'\| PD \| - \| \d', table) and re.search(r'\| DDIM \| \d.* \| \d', table)
    assert models.load_model(folder / 'study/PD/seed0/2').diffusion.mean_type == 'v'


@pytest.mark.skipif(not os.environ.get('FULL_SIZE'), reason='a minute and 2 GiB: FULL_SIZE=1')
@pytest.mark.parametrize('config', [
    dict(CIFAR10, sample_size=32, block_out_channels=(128, 256, 256, 256)),
    dict(CELEBAHQ, sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512))],
    ids=['cifar10', 'celebahq'])
def test_published_configurations_in_full(tmp_path, config):
    unet, _ = pipeline(tmp_path / 'given', **config)
    model = models.load_model(tmp_path / 'given', steps=128)
    x, t = noise(1, config['sample_size']), torch.tensor([500])
    with torch.no_grad():
        assert (model.network(x, t + 1) - unet(x, t).sample).abs().max() < 1e-4
    assert isinstance(model.network, UNet) and model.diffusion.T == 128


def test_own_networks_of_every_output(tmp_path):
    """train_base.py with v, and a student with v of a teacher of eps; without diffusers."""
    tiny = [*TRAINING, '--img_size=8', '--ch=32', '--ch_mult=1', '--ch_mult=1', '--attn=1',
            '--num_res_blocks=1']
    jobs = {name: [command(['train_base.py'], *tiny, '--T=8', f'--mean_type={name}',
                           f'--logdir={tmp_path}/{name}'),
                   command(['PD.py'], *tiny, f'--base_ckpt={tmp_path}/{name}',
                           f'--logdir={tmp_path}/{name}_4')] for name in ('v', 'epsilon')}
    jobs['v'].append(command(['train_base.py'], *tiny, '--T=8', '--mean_type=v', '--loss_type=eps',
                             f'--logdir={tmp_path}/eps'))
    for name, results in fork_all(jobs).items():
        assert_ran(results)
        assert ('note: the student predicts v' in results[1][1]) == (name == 'epsilon')
        teacher, student = (models.load_model(tmp_path / folder).diffusion
                            for folder in (name, f'{name}_4'))
        assert (teacher.mean_type, student.mean_type) == (name, 'v')
        assert student.times() == [8, 6, 4, 2, 0] and student.schedule == 'cosine'
    losses = [json.loads((tmp_path / name / 'metrics.jsonl').read_text())['loss']
              for name in ('v', 'eps')]
    assert losses[0] > losses[1] > 0        # the larger of two errors, and one of them


def test_no_student_of_eps_where_alpha_ends_at_0(folder):
    pipeline(folder / 'zero', dict(prediction_type='v_prediction', rescale_betas_zero_snr=True))
    words = ['PD.py', *TRAINING, '--img_size=8', f'--base_ckpt={folder}/zero', '--teacher_steps=8',
             '--mean_type=epsilon', f'--logdir={folder}/none']
    (code, _, error), = fork_all(dict(it=[command(words)]))['it']
    assert code == 2 and 'ends with alpha 0' in error and '--mean_type=v' in error, error
    assert not (folder / 'none').exists()


def test_a_run_goes_on_with_what_its_student_predicts(folder):
    """The flagfile that a run leaves, and the same command, resume it; another output does not."""
    words = ['PD.py', *TRAINING, '--img_size=8', f'--base_ckpt={folder}/heads',
             '--teacher_steps=8', f'--logdir={folder}/again']
    more = ['--total_steps=2']
    first, second, third, other = fork_all(dict(it=[
        command(words), command(words, *more),
        command(['PD.py'], f'--flagfile={folder}/again/flagfile.txt', '--total_steps=3'),
        command(words, '--total_steps=4', '--mean_type=xstart')]))['it']
    assert_ran([first, second, third])
    assert 'resuming at step 1' in second[1] and 'resuming at step 2' in third[1]
    assert other[0] == 2 and '--mean_type is xstart and the run in' in other[2]
