"""The section "Your own images" of docs/data.md, command by command, on twelve small pictures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import checkpoint
from runtime.torchvision_cpu import torchvision

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / 'docs/data.md').read_text().split('## Your own images\n')[1].split('\n## ')[0]
TINY = ('--ch=32 --num_res_blocks=1 --img_size=8 --batch_size=4 --total_steps=1 --warmup=0 '
        '--num_workers=0 --sample_size=4 --log_step=1').split()


def documented_commands():
    """([commands with labels], [command without]) of the section, as lists of words."""
    blocks = SECTION.split('```')[1::2]
    return [[line.split()[1:] for line in block.strip().splitlines()] for block in blocks]


def overrides(words, folder):
    """What makes a command of the page tiny, and keeps its results in `folder`.

    Paths that scripts anchor at the repository root have to be given again; the rest is relative.
    """
    scorer = f'--feature_network={folder}/logs/photos/classifier/folder/densenet_small'
    return {
        'train_base.py': [*TINY, '--T=16'],
        'PD.py': TINY,
        'classifier/train.py': [
            '--model=densenet_small', '--img_size=8', '--epoch=1', '--batchsize=4', '--seed=0',
            '--num_workers=0', f'--result_path={folder}/logs/photos/classifier'],
        'train_rdd.py': [*TINY, '--queue_size=64', '--contrast_size=16', '--queue_update=8'] + (
            ['--classifier=imagenet_resnet18', f'--classifier_path={folder}/resnet18.pt',
             f'--logdir={folder}/logs/photos/unlabelled']
            if 'imagenet_resnet50' in words else
            ['--classifier=densenet_small',
             '--classifier_path=./logs/photos/classifier/folder/densenet_small']),
        'score/get_npz.py': ['--img_size=8', '--num_workers=0', scorer,
                             f'--output={folder}/stats/photos.npz'],
        'ddim_eval.py': ['--ch=32', '--num_res_blocks=1', '--img_size=8', '--num_images=12',
                         '--batch_size=8', scorer, '--save_images=./images'],
        'tools/plot.py': [], 'export.py': []}[words[0]]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """(folder, {command: [code, output, error]})"""
    folder = tmp_path_factory.mktemp('own')
    rng = np.random.default_rng(0)
    for kind, suffix in (('cats', 'jpg'), ('dogs', 'png')):
        (folder / 'photos/train' / kind).mkdir(parents=True)
        for i in range(6):
            picture = Image.fromarray(rng.integers(0, 256, (12, 16 + i, 3), dtype=np.uint8))
            picture.save(folder / f'photos/train/{kind}/{i}.{suffix}')
    (folder / 'config').symlink_to(ROOT / 'config')
    resnet18 = torchvision().models.resnet18(weights=None)
    torch.save(resnet18.state_dict(), folder / 'resnet18.pt')
    chain, without_labels = documented_commands()
    env = dict(XDG_CACHE_HOME=f'{folder}/cache')
    commands = [dict(argv=[*words, *overrides(words, folder)], cwd=str(folder), env=env)
                for words in chain + without_labels]
    done = subprocess.run([sys.executable, str(ROOT / 'tests/forks.py')], stdout=subprocess.PIPE,
                          input=json.dumps(dict(it=commands)), universal_newlines=True, check=True)
    return folder, [(words[0], *result) for words, result in zip(
        chain + without_labels, json.loads(done.stdout)['it'])]


def test_commands_end_well(photos):
    folder, results = photos
    assert [name for name, *_ in results] == [
        'train_base.py', 'PD.py', 'classifier/train.py', 'train_rdd.py', 'score/get_npz.py',
        'ddim_eval.py', 'tools/plot.py', 'export.py', 'train_rdd.py']
    packages = {'tools/plot.py': 'matplotlib', 'export.py': 'diffusers'}
    for name, code, _, error in results:
        assert 'Traceback' not in error, error
        if name in packages and importlib.util.find_spec(packages[name]) is None:
            assert code == 1 and 'requirements-export.txt' in error
        else:
            assert code == 0, error


def test_results_of_the_chain(photos):
    folder, results = photos
    steps = {name: checkpoint.read(folder / 'logs/photos' / name)['T']
             for name in ('1024', '8', '8to4/rdd', 'unlabelled')}
    assert steps == {'1024': 16, '8': 8, '8to4/rdd': 4, 'unlabelled': 4}
    result = json.loads((folder / 'logs/photos/8to4/rdd/results.jsonl').read_text())
    assert (result['nfe'], result['method'], result['num_images']) == (4, 'rdd', 12)
    assert '| RDD | 4 | ' in dict((name, output) for name, _, output, _ in results)['tools/plot.py']
    for name in ('eval', 'trajectory'):
        assert (folder / f'logs/photos/8to4/rdd/sample/{name}_nfe4_seed0.png').is_file()
    assert Image.open(folder / 'images/000011.png').size == (8, 8)
    assert len(list((folder / 'images').iterdir())) == 12


def test_exported_student(photos):
    pytest.importorskip('diffusers', reason='optional, see requirements-export.txt')
    folder, _ = photos
    assert {'model_index.json', 'README.md', 'unet', 'scheduler'} <= {
        path.name for path in (folder / 'export/photos').iterdir()}
    text = (folder / 'export/photos/README.md').read_text()
    assert 'train_rdd.py' in text and '| 4 | ' in text and '12' in text
