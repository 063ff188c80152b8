"""Nothing in the full path of SimFlow untried: the S configuration at 256x256, as in the paper, on a CPU."""
import resource
import subprocess
import sys

import pytest

CODE = '''
import resource, time, torch
torch.set_num_threads(2)
from flowbook.guidance import StarGuidance
from flowbook.simflow import PAPER, Adversarial, FlowNLL, Joint, PatchCritic, Reconstruction, paper_model
from flowbook.train import fit
peak = lambda: f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB'
began, image, y = time.time(), torch.rand(1, 3, 256, 256) * 2 - 1, torch.tensor([207])
torch.manual_seed(0)
model = paper_model('S')
print(f'built: {sum(p.numel() for p in model.parameters()):,} parameters, {time.time() - began:.0f} s, {peak()}', flush=True)
before = {k: v.clone() for k, v in model.state_dict().items()}
logs, = fit(model, [(image, y)], Joint(Reconstruction(1), FlowNLL(), Adversarial(PatchCritic())), steps=1, **PAPER)
assert all(torch.isfinite(torch.as_tensor(v)) for v in logs.values()), logs
assert {k.split('.')[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == {'encoder', 'decoder', 'flow'}
print(f'one step: {logs}, {time.time() - began:.0f} s, {peak()}', flush=True)
model.eval()
x = model.sample(y, StarGuidance(1.), gamma=.25, generator=torch.Generator().manual_seed(0))
assert x.shape == (1, 3, 256, 256) and x.isfinite().all()
print(f'one image, guided: {time.time() - began:.0f} s, {peak()}', flush=True)
'''


@pytest.mark.slow
def test_one_step_and_one_image_at_256():
    "In a process of its own: its peak memory is that of this path."
    r = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, timeout=900)
    print('\n' + r.stdout, f'peak of all children so far: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB')
    assert r.returncode == 0 and r.stdout.count('GiB') == 3, r.stderr
