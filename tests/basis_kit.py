"""Small matrices in float64, and pairs of factors."""

import torch
from strategies import random_spd

F64 = torch.float64


def eye(r):
    return torch.eye(r, dtype=F64)


def norm(M):
    return torch.linalg.matrix_norm(M, 2)


def pair_of_factors(L, r, g, scale=1.0):
    return random_spd(L, r, g), scale * random_spd(L, r, g)
