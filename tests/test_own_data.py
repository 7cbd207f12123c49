"""The section "Your own images" of docs/data.md, command by command, on twelve small pictures."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, command, fork_all
from runtime import checkpoint
from runtime.torchvision_cpu import torchvision

SECTION = (ROOT / 'docs/data.md').read_text().split('## Your own images\n')[1].split('\n## ')[0]
TINY = ('--ch=32 --num_res_blocks=1 --img_size=8 --batch_size=4 --total_steps=1 --warmup=0 '
        '--num_workers=0 --sample_size=4 --log_step=1').split()
CLASSIFIER = 'logs/photos/classifier/folder/densenet_small'
PACKAGES = {'tools/plot.py': 'matplotlib', 'export.py': 'diffusers'}     # that may be missing


def overrides(words, folder):
    """What makes a command of the page tiny, and keeps its results in `folder`.

    Paths that scripts anchor at the repository root have to be given again; the rest is relative.
    """
    if 'imagenet_resnet50' in words:
        classifier = ['--classifier=imagenet_resnet18', f'--classifier_path={folder}/resnet18.pt',
                      f'--logdir={folder}/logs/photos/unlabelled']
    else:
        classifier = ['--classifier=densenet_small', f'--classifier_path={CLASSIFIER}']
    scorer = f'--feature_network={folder}/{CLASSIFIER}'
    return {
        'train_base.py': [*TINY, '--T=16'],
        'PD.py': TINY,
        'classifier/train.py': [
            '--model=densenet_small', '--img_size=8', '--epoch=1', '--batchsize=4', '--seed=0',
            '--num_workers=0', f'--result_path={folder}/logs/photos/classifier'],
        'train_rdd.py': [*TINY, '--queue_size=64', '--contrast_size=16', '--queue_update=8',
                         *classifier],
        'score/get_npz.py': ['--img_size=8', '--num_workers=0', scorer,
                             f'--output={folder}/stats/photos.npz'],
        'ddim_eval.py': ['--num_images=12', '--batch_size=8', scorer, '--save_images=./images'],
        'tools/plot.py': [], 'export.py': []}[words[0]]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """(folder, [(script, exit code, output, error)])"""
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
    lines = [line.split()[1:] for block in SECTION.split('```')[1::2]
             for line in block.strip().splitlines()]
    commands = [command(words, *overrides(words, folder), cwd=str(folder),
                        env=dict(XDG_CACHE_HOME=f'{folder}/cache')) for words in lines]
    results = fork_all(dict(it=commands))['it']
    return folder, [(words[0], *result) for words, result in zip(lines, results)]


def test_commands_end_well(photos):
    folder, results = photos
    assert [name for name, *_ in results] == [
        'train_base.py', 'PD.py', 'classifier/train.py', 'train_rdd.py', 'score/get_npz.py',
        'ddim_eval.py', 'tools/plot.py', 'export.py', 'train_rdd.py']
    for name, code, output, error in results:
        missing = name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
        assert code == missing and 'Traceback' not in error, error
        if name == 'tools/plot.py':
            assert missing or '| RDD | 4 | ' in output


def test_results_of_the_chain(photos):
    folder, _ = photos
    steps = {name: checkpoint.read(folder / 'logs/photos' / name)['T']
             for name in ('1024', '8', '8to4/rdd', 'unlabelled')}
    assert steps == {'1024': 16, '8': 8, '8to4/rdd': 4, 'unlabelled': 4}
    result = json.loads((folder / 'logs/photos/8to4/rdd/results.jsonl').read_text())
    assert (result['nfe'], result['method'], result['num_images']) == (4, 'rdd', 12)
    assert (folder / 'logs/photos/8to4/rdd/sample/eval_nfe4_seed0.png').is_file()
    assert len(list((folder / 'images').iterdir())) == 12
    if importlib.util.find_spec('diffusers'):
        text = (folder / 'export/photos/README.md').read_text()
        assert 'train_rdd.py' in text and '| 4 | ' in text and '12' in text
