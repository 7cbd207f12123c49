"""The README's walk through one's own images: every command as written, made tiny at its end."""

import re
import shlex

import pytest
from PIL import Image

from runtime import checkpoint
from test_scripts import ROOT, command, fork_all

TINY = '--ch=32 --num_res_blocks=1 --batch_size=4 --num_workers=0'.split()
STEPS = TINY + '--total_steps=2 --save_step=0 --sample_step=0 --log_step=1 --sample_size=4'.split()
SMALLER = {
    'train_base.py': STEPS, 'PD.py': STEPS,
    'train_rdd.py': STEPS + '--queue_size=64 --contrast_size=16 --queue_update=8'.split(),
    'classifier/train.py': '--epoch=1 --batchsize=4 --num_workers=0'.split(),
    'score/get_npz.py': ['--num_workers=0', '--feature_network=SCORER'],
    'ddim_eval.py': ['--num_images=8', '--batch_size=4', '--feature_network=SCORER', '--ch=32',
                     '--num_res_blocks=1']}


def commands(places):
    """The commands of the section, as words, with its folders replaced by those of the test."""
    text = (ROOT / 'README.md').read_text()
    section = text.split('\n## Your own images\n')[1].split('\n## ')[0]
    block = re.search('```\n(.*?)```', section, re.S).group(1)
    for line in block.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ['python']:
            words += SMALLER.get(words[1], [])
            for place, path in places.items():
                words = [word.replace(place, str(path)) for word in words]
            yield words[1:]


@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp('own')
    for i in range(8):
        path = folder / f'images/{"ab"[i % 2]}/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 36), (30 * i, 255 - 30 * i, 60)).save(str(path))
    places = {'./my_images': folder / 'images', './my_model': folder / 'model',
              './logs/mine': folder / 'logs',
              './classifier/result/folder/resnet18': folder / 'result/folder/resnet18',
              './stats/folder.train.npz': folder / 'stats.npz',
              'SCORER': folder / 'result/folder/resnet18'}
    words = list(commands(places))
    for one in words:       # these two write where no flag of the README says
        one += dict([('classifier/train.py', [f'--result_path={folder}/result']),
                     ('score/get_npz.py', [f'--output={folder}/stats.npz'])]).get(one[0], [])
    return folder, words, fork_all(dict(walk=[command(one) for one in words]))['walk']


def test_every_command_of_the_readme_runs(walked):
    folder, words, results = walked
    assert [one[0] for one in words if one[0] != 'export.py'] == [
        'train_base.py', 'PD.py', 'classifier/train.py', 'train_rdd.py', 'score/get_npz.py',
        'ddim_eval.py']
    for one, (code, _, err) in zip(words, results):
        if one[0] == 'export.py':
            continue        # its packages are extras: test_export.py
        assert code == 0 and 'Traceback' not in err, (one, err)
    assert checkpoint.read(folder / 'logs/rdd')['T'] == 4
    assert (folder / 'logs/rdd/results.jsonl').is_file()
