"""The list of stumbles: every one has an answer, and the table counts what is there."""
import re
from pathlib import Path

import pytest

WALKS = Path(__file__).parents[1]/'nbs'/'walks'
LISTS = sorted(f for f in WALKS.glob('*.md') if f.name != 'README.md')


def stumbles(text):
    "(name, words, state, answer) of each item of a list."
    return re.findall(r'^- \*\*([\w-]+)\*\* (.+?)  \n  \*\*(Done|Left)\*\*: (.*)$', text, re.M)


def test_three_walks_or_more(): assert len(LISTS) >= 3

@pytest.mark.parametrize('file', LISTS, ids=lambda f: f.stem)
def test_every_stumble_is_answered(file):
    text = file.read_text(encoding='utf-8')
    found = stumbles(text)
    assert len(found) == len(re.findall(r'^- \*\*', text, re.M)) > 30
    assert len({n for n, *_ in found}) == len(found), 'a name twice'
    assert not [n for n, words, _, answer in found if len(answer.strip()) < 5 or not words.strip()], 'no answer'
    row = re.search(rf'\({file.name}\) \| (\d+) \| (\d+) \| (\d+) \|', (WALKS/'README.md').read_text(encoding='utf-8'))
    states = [s for *_, s, _ in found]
    assert tuple(map(int, row.groups())) == (len(found), states.count('Done'), states.count('Left'))


def test_an_item_without_an_answer_is_seen():
    assert stumbles('- **1** words  \n  **Done**: it is done') and not stumbles('- **1** words  \n  ****: ')
