"""What the README promises, run: its library example, its commands, its links."""
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')


def blocks(language): return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def test_the_library_example_runs(tmp_path, monkeypatch):
    "As printed, but for the number of steps."
    code, = [b for b in blocks('python') if 'TarFlow(' in b]
    assert code.count('1000') == 2
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace('1000', '3').replace('warmup=50', 'warmup=1'), names)
    assert names['images'].shape == (3, 1, 8, 8) and names['nats'].shape == (3,) and names['nats'].isfinite().all()
    from flowbook.tarflow import TarFlow
    assert torch.equal(TarFlow.from_pretrained('my_flow').log_prob(names['images']), names['flow'].log_prob(names['images']))


def test_the_example_with_a_checkpoint_runs(capsys):
    "As printed, with fewer samples."
    code, = [b for b in blocks('python') if 'from_pretrained(' in b]
    assert code.count('1000') == 1
    names = {}
    exec(code.replace('1000', '60'), names)
    assert names['images'].shape == (60, 1, 8, 8) and "'fid'" in capsys.readouterr().out


def test_two_commands_that_set_up_everything():
    commands = [b.strip() for b in blocks('bash') if '.venv' in b]
    assert len(commands) == 2 and all(c.startswith('python3 -m venv .venv && . .venv/bin/activate && pip install -e ') and '\n' not in c for c in commands)
    assert commands[0].endswith('flowbook_demo') and commands[1].endswith('nbdev_test && pytest')


def test_links_lead_somewhere():
    links = [u for u in re.findall(r'\]\(([^)\s]+)\)', README) if not re.match(r'[a-z]+:', u)]
    assert links and not [u for u in links if not (ROOT/u.split('#')[0]).exists()]


def test_every_notebook_is_in_the_map():
    assert not [n.name for n in (ROOT/'nbs').glob('*.ipynb') if n.name not in README]
