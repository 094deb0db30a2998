"""The papers' formulas in float64 NumPy, written for reading: what the tests compare with."""

import numpy as np


def squash(s, axis=-1):
    norm = np.linalg.norm(s, axis=axis, keepdims=True)
    direction = np.divide(s, norm, out=np.zeros_like(s), where=norm > 0)
    return norm**2 / (1 + norm**2) * direction


def softmax(b, axis=-1):
    exponentials = np.exp(b - b.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def leaky_softmax(b):
    """Softmax over the parents and one logit of zero, which is dropped."""
    return softmax(np.concatenate([np.zeros_like(b[..., :1]), b], axis=-1))[..., 1:]


def margin_terms(lengths, labels, m_plus=0.9, m_minus=0.1, lambda_=0.5):
    present = np.maximum(0, m_plus - lengths) ** 2
    absent = np.maximum(0, lengths - m_minus) ** 2
    return labels * present + lambda_ * (1 - labels) * absent


def dense_votes(poses, weights):
    """Loops over every pair: the child's pose times the matrix of the pair."""
    (children, _), (_, _, parents, features) = poses.shape, weights.shape
    votes = np.zeros((children, parents, features))
    for i in range(children):
        for j in range(parents):
            votes[i, j] = poses[i] @ weights[i, :, j]
    return votes


def dynamic_routing(votes, num_iterations, logits=0.0, bias=0.0, where=None, leaky=False):
    """Procedure 1 of the paper for one example, votes [I, J, D], line by line."""
    children, parents, features = votes.shape
    b = np.broadcast_to(np.asarray(logits, float), (children, parents)).copy()
    taking_part = np.ones(children, bool) if where is None else where
    for _ in range(num_iterations):
        c = leaky_softmax(b) if leaky else softmax(b)
        c = c * taking_part[:, None]
        s = np.zeros((parents, features)) + bias
        for i in np.flatnonzero(taking_part):
            s = s + c[i][:, None] * votes[i]
        v = squash(s)
        for i in np.flatnonzero(taking_part):
            b[i] += (votes[i] * v).sum(-1)
    return v, np.linalg.norm(v, axis=-1), c


def convolution(images, kernel, strides, pads):
    """Cross-correlation of [B, H, W, C] with [KH, KW, C, O], one output pixel at a time."""
    images = np.pad(images, ((0, 0), *pads, (0, 0)))
    (_, height, width, _), (kh, kw, _, features) = images.shape, kernel.shape
    rows, columns = (height - kh) // strides[0] + 1, (width - kw) // strides[1] + 1
    out = np.zeros((len(images), rows, columns, features))
    for row in range(rows):
        for column in range(columns):
            top, left = row * strides[0], column * strides[1]
            patch = images[:, top : top + kh, left : left + kw]
            out[:, row, column] = np.tensordot(patch, kernel, 3)
    return out
