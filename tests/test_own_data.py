"""The section "Your own images" of docs/data.md, command by command, on twelve small pictures."""

import importlib.util
import json

import torch

from helpers import ROOT, command, fork_all
from runtime import checkpoint
from runtime.torchvision_cpu import torchvision
from wiring import make_photos

SECTION = (ROOT / 'docs/data.md').read_text().split('## Your own images\n')[1].split('\n## ')[0]
COMMANDS = [line.split()[1:] for block in SECTION.split('```')[1::2]
            for line in block.strip().splitlines()]
TINY = ['--img_size=8', '--num_workers=0']
TRAINING = [*TINY, '--batch_size=4', '--total_steps=1', '--sample_size=4', '--log_step=1']
NETWORK = ['--ch=32', '--num_res_blocks=1']
RDD = [*TRAINING, '--queue_size=64', '--contrast_size=16', '--queue_update=8']
CLASSIFIER = 'logs/photos/classifier/folder/densenet_small'
PACKAGES = {'tools/plot.py': 'matplotlib', 'export.py': 'diffusers'}     # that may be missing


def overrides(words, folder):
    """What makes a command of the page tiny; paths from the root of the repository, once more."""
    if 'imagenet_resnet50' in words:
        return [*RDD, '--classifier=imagenet_resnet18', f'--classifier_path={folder}/resnet18.pt',
                f'--logdir={folder}/logs/photos/unlabelled']
    scorer = f'--feature_network={folder}/{CLASSIFIER}'
    return {
        'train_base.py': [*TRAINING, *NETWORK, '--warmup=0', '--T=16'],
        'PD.py': TRAINING,
        'classifier/train.py': [*TINY, '--model=densenet_small', '--epoch=1', '--batchsize=4',
                                '--seed=0', f'--result_path={folder}/logs/photos/classifier'],
        'train_rdd.py': [*RDD, '--classifier=densenet_small', f'--classifier_path={CLASSIFIER}'],
        'score/get_npz.py': [*TINY, scorer, f'--output={folder}/stats/photos.npz'],
        'ddim_eval.py': ['--num_images=12', '--batch_size=8', scorer, '--save_images=./images'],
        'tools/plot.py': [], 'export.py': []}[words[0]]


def test_the_commands_of_the_page(tmp_path):
    make_photos(tmp_path / 'photos', count=12)
    (tmp_path / 'config').symlink_to(ROOT / 'config')
    resnet18 = torchvision().models.resnet18(weights=None)
    torch.save(resnet18.state_dict(), tmp_path / 'resnet18.pt')
    results = fork_all(dict(page=[
        command(words, *overrides(words, tmp_path), cwd=str(tmp_path),
                env=dict(XDG_CACHE_HOME=f'{tmp_path}/cache')) for words in COMMANDS]))['page']
    assert len(results) == 9
    for (script, *_), (code, output, error) in zip(COMMANDS, results):
        missing = script in PACKAGES and importlib.util.find_spec(PACKAGES[script]) is None
        assert code == missing and 'Traceback' not in error, error
        assert script != 'tools/plot.py' or missing or '| 8to4/rdd | 4 | ' in output
    runs = tmp_path / 'logs/photos'
    steps = [checkpoint.read(runs / name)['T'] for name in ('1024', '8', '8to4/rdd', 'unlabelled')]
    assert steps == [16, 8, 4, 4]
    result = json.loads((runs / '8to4/rdd/results.jsonl').read_text())
    assert (result['nfe'], result['method'], result['num_images']) == (4, 'rdd', 12)
    assert (runs / '8to4/rdd/sample/eval_nfe4_seed0.png').is_file()
    assert len(list((tmp_path / 'images').iterdir())) == 12
    if importlib.util.find_spec('diffusers'):
        text = (tmp_path / 'export/photos/README.md').read_text()
        assert 'train_rdd.py' in text and '| 4 | ' in text
