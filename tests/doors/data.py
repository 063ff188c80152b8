import torch

from doors import choice, door, number, tensor, whole

DOORS = [
    door('check_whole', lambda tmp: dict(name='v', v=3, least=1, most=5), v=whole(1, 5)),
    door('check_number', lambda tmp: dict(name='v', v=.5, low=0, high=1, above=True, below=True), v=number(0, 1, True, True)),
    door('check_choice', lambda tmp: dict(name='v', v='a', choices=('a', 'b')), v=choice()),
    door('check_tensor', lambda tmp: dict(name='x', x=torch.zeros(2, 3, 4), axes='b 3 n'), x=[*tensor(), torch.zeros(2, 3), torch.zeros(2, 4, 4), torch.zeros(2, 3, 4).long()]),
]
INNER = {}
