"""A checkpoint of the book can be made again by its command."""
import subprocess
import sys

import pytest
import torch

from flowbook.data import load
from flowbook.metrics import DigitClassifier, digit_classifier
from flowbook.scripts.remake import RECIPES
from flowbook.flows import weights_folder


def test_every_shipped_checkpoint_has_a_recipe_and_a_card():
    shipped = sorted(p.name for p in weights_folder().iterdir() if p.is_dir())
    assert shipped == sorted(RECIPES)
    for name in shipped:
        assert {'README.md', 'card.json', 'config.json', 'model.safetensors'} == {p.name for p in (weights_folder()/name).iterdir()}


@pytest.mark.slow
def test_the_judge_is_made_again(tmp_path):
    "The same recipe and seed: the same accuracy within four of 360 digits, and the same opinion nearly everywhere."
    r = subprocess.run([sys.executable, '-m', 'flowbook.scripts.remake', 'digits-classifier', '--out', str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    old, new = digit_classifier(), DigitClassifier.from_pretrained(tmp_path/'digits-classifier')
    assert {k: old.card[k] for k in ('data', 'seed', 'steps', 'command')} == {k: new.card[k] for k in ('data', 'seed', 'steps', 'command')}
    assert abs(old.card['test_accuracy'] - new.card['test_accuracy']) <= 4 / 360
    test = load('digits', 'test')
    x, _ = test.batch(range(len(test)))
    with torch.no_grad(): same = (old(x).argmax(1) == new(x).argmax(1)).float().mean().item()
    print(f'\nthe judge made again: {new.card}, agrees with the shipped one on {same:.1%}')
    assert same >= .98
