"""What tests of damaged and malicious files share: the rows of the table of faults, and pickles that would show that they ran."""
import pickle

import torch

from flowbook.faults import Bomb

PICKLE = 'malice', 'a pickle that runs code lies in place of a file of weights, latents or settings', 'refused, nothing of it runs, the file is named; take the file from where it can be trusted'
RUBBISH = 'disk', 'a file of weights, latents or settings is empty, cut off or rubbish', 'refused, the file is named; delete it and take it again from where it came'
UNFIT = 'disk', 'a readable file of weights or latents lacks a tensor, or has one of another shape, kind or range', 'refused, the file and what is wrong with it are named; delete it and take it again from where it came'
SETTINGS = 'malice', 'settings beside weights or latents are of another kind, incomplete, or ask for absurd sizes', 'refused before anything is built or counted, and named; take them again from where they came'


def pickles(mark):
    "A pickle, and the two kinds of file that torch.save makes of one; each would make the folder `mark`."
    found = [pickle.dumps(Bomb(mark))]
    for zipped in (True, False):
        torch.save({'weights': Bomb(mark)}, path := mark.with_name('a-pickle'), _use_new_zipfile_serialization=zipped)
        found.append(path.read_bytes()); path.unlink()
    return found
