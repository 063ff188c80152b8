import torch

from doors import door, flag, number, whole
from doors.noise import FLOWS, IMAGES, LABELS, batch_of

ALL = dict(flow=FLOWS, x=IMAGES, y=LABELS, checkpoint=flag())

DOORS = [
    door('score', lambda tmp: batch_of(checkpoint=True), **ALL),
    door('log_prob_and_score', lambda tmp: batch_of(checkpoint=False), **ALL),
    door('check_samples', lambda tmp: batch_of(), flow=FLOWS, x=['a picture', None, 3, torch.zeros(3, 1, 4, 4).long(), torch.zeros(3)], y=LABELS),
    door('denoise', lambda tmp: batch_of(sigma=.1, steps=1, checkpoint=False), sigma=number(0), steps=whole(0), **ALL),
]
INNER = {'the part of `log_prob_and_score` without checks, for those who have checked': 'frozen_log_prob',
         'experiments and their verdicts: `flowbook.evidence` calls them with budgets of its own, and test_evidence runs them': 'judge_tweedie tweedie judge_noise_sweep best_sigma train_for_sweep noise_sweep sampled'}
