"""The papers' formulas in float64 NumPy, written for reading: what the tests compare with."""

import numpy as np
import scipy.special


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


def unit(s):
    norm = np.linalg.norm(s, axis=-1, keepdims=True)
    return np.divide(s, norm, out=np.zeros_like(s), where=norm > 0)


def weighted_sums(coupling, votes, bias=0.0):
    """Sums over the children, one at a time."""
    s = np.zeros(votes.shape[1:]) + bias
    for i in range(len(votes)):
        s = s + coupling[i][:, None] * votes[i]
    return s


def squashed(coupling, votes, bias=0.0):
    v = squash(weighted_sums(coupling, votes, bias))
    return v, np.linalg.norm(v, axis=-1), coupling


def uniform_routing(votes, bias=0.0):
    return squashed(np.full(votes.shape[:2], 1 / votes.shape[1]), votes, bias)


def kmeans_routing(votes, num_iterations, bias=0.0):
    coupling = np.full(votes.shape[:2], 1 / votes.shape[1])
    for _ in range(num_iterations - 1):
        centres = unit(weighted_sums(coupling, votes, bias))
        coupling = softmax(np.einsum("ijd,jd->ij", votes, centres))
    return squashed(coupling, votes, bias)


def efficient_routing(votes, prior=0.0):
    """With the matrix of all pairs of children, as in the paper."""
    children, parents, features = votes.shape
    logits = np.zeros((children, parents))
    for j in range(parents):
        pairs = votes[:, j] @ votes[:, j].T / np.sqrt(features)
        logits[:, j] = pairs.sum(1)
    coupling = softmax(logits) + prior
    s = weighted_sums(coupling, votes)
    v = (1 - np.exp(-np.linalg.norm(s, axis=-1, keepdims=True))) * unit(s)
    return v, np.linalg.norm(v, axis=-1), coupling


def self_routing(votes, activations, logits):
    coupling = softmax(logits)
    shares = activations[:, None] * coupling
    poses = weighted_sums(shares, votes) / shares.sum(0)[:, None]
    return poses, shares.sum(0) / activations.sum(), coupling


def layer_norm(s, scale=1.0, offset=0.0, epsilon=1e-5):
    mean, variance = s.mean(-1, keepdims=True), s.var(-1, keepdims=True)
    return (s - mean) / np.sqrt(variance + epsilon) * scale + offset


def attention_routing(votes, num_iterations, scale=1.0, offset=0.0):
    coupling = np.full(votes.shape[:2], 1 / votes.shape[1])
    for _ in range(num_iterations - 1):
        poses = layer_norm(weighted_sums(coupling, votes), scale, offset)
        agreement = np.einsum("ijd,jd->ij", votes, poses)
        coupling = softmax(agreement / np.sqrt(votes.shape[-1]))
    s = weighted_sums(coupling, votes)
    return layer_norm(s, scale, offset), np.linalg.norm(squash(s), axis=-1), coupling


def em_routing(
    votes, activations, beta_a, beta_u, num_iterations, inverse_temperature=0.01, epsilon=1e-4
):
    """Procedure 1 of the paper, with densities and not their logarithms, in loops."""
    children, parents, features = votes.shape
    responsibility = np.full((children, parents), 1 / parents)
    for t in range(num_iterations):
        used = responsibility
        mean, variance = np.zeros((parents, features)), np.zeros((parents, features))
        active, density = np.zeros(parents), np.zeros((children, parents))
        for j in range(parents):
            r = used[:, j] * activations
            mass = r.sum()
            mean[j] = (r[:, None] * votes[:, j]).sum(0) / mass
            variance[j] = (r[:, None] * (votes[:, j] - mean[j]) ** 2).sum(0) / mass + epsilon
            cost = ((beta_u[j] + np.log(np.sqrt(variance[j]))) * mass).sum()
            temper = inverse_temperature * (1 - 0.95 ** (t + 1))
            active[j] = sigmoid(temper * (beta_a[j] - cost))
            norm = 1 / np.sqrt(np.prod(2 * np.pi * variance[j]))
            quadratic = ((votes[:, j] - mean[j]) ** 2 / (2 * variance[j])).sum(-1)
            density[:, j] = active[j] * norm * np.exp(-quadratic)
        responsibility = density / density.sum(1, keepdims=True)
    return mean, active, used


def variational_routing(votes, activations, beta_a, beta_u, num_iterations):
    """Algorithm 1 of the paper with α = κ = 1, ν = D + 1, Ψ = 1 and matrices of precision."""
    digamma = scipy.special.digamma
    children, parents, features = votes.shape
    responsibility = np.full((children, parents), 1 / parents)
    for _ in range(num_iterations):
        used = responsibility
        count = (used * activations[:, None]).sum(0)
        kappa, nu = 1 + count, features + 1 + count
        log_pi = digamma(1 + count) - digamma((1 + count).sum())
        m, log_det = np.zeros((parents, features)), np.zeros(parents)
        log_r = np.zeros((children, parents))
        for j in range(parents):
            r = (used[:, j] * activations)[:, None]
            centre = (r * votes[:, j]).sum(0) / count[j]
            m[j] = count[j] * centre / kappa[j]
            scatter = (r * (votes[:, j] - centre) ** 2).sum(0) + count[j] / kappa[j] * centre**2
            precision = np.linalg.inv(np.eye(features) + np.diag(scatter))
            log_det[j] = (
                sum(digamma((nu[j] - d) / 2) for d in range(features))
                + features * np.log(2)
                + np.linalg.slogdet(precision)[1]
            )
            for i in range(children):
                d = votes[i, j] - m[j]
                quadratic = features / kappa[j] + nu[j] * d @ precision @ d
                log_r[i, j] = log_pi[j] + (log_det[j] - quadratic) / 2
        responsibility = softmax(log_r)
    entropy = features / 2 * np.log(2 * np.pi * np.e) - log_det / 2
    return m, sigmoid(beta_a - beta_u - np.exp(log_pi) * entropy), used


def heinsen_routing(poses, p, num_iterations):
    """With stored votes; p holds the parameters by name."""
    children = len(poses)
    scaled = poses / np.sqrt(children)
    present = sigmoid((scaled * p["activation_kernel"]).sum(-1) + p["activation_bias"])
    votes = np.zeros((children, *p["vote_bias"].shape))
    for i in range(children):
        votes[i] = (scaled[i] * p["vote_gates"]) @ p["vote_kernel"] + p["vote_bias"]
    coupling = np.full(votes.shape[:2], 1 / votes.shape[1])
    for _ in range(num_iterations):
        used = present[:, None] * coupling
        phi = p["use"] * used - p["ignore"] * (present[:, None] - used)
        out, last = weighted_sums(phi, votes), coupling
        predicted = layer_norm(out) @ p["prediction_kernel"] * p["prediction_gates"]
        fit = poses @ (predicted + p["prediction_bias"]).T
        coupling = softmax(np.log(sigmoid(fit * p["score_scale"] + p["score_bias"])))
    return layer_norm(out), np.linalg.norm(squash(out), axis=-1), last


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolution(images, kernel, strides, pads):
    """Cross-correlation of [B, H, W, C] with [KH, KW, C, O], one output pixel at a time.

    Or with any other number of spatial axes.
    """
    images, size = np.pad(images, ((0, 0), *pads, (0, 0))), kernel.shape[:-2]
    shape = [
        (n - k) // stride + 1
        for n, k, stride in zip(images.shape[1:-1], size, strides, strict=True)
    ]
    out = np.zeros((len(images), *shape, kernel.shape[-1]))
    for place in np.ndindex(*shape):
        corner = [p * stride for p, stride in zip(place, strides, strict=True)]
        window = tuple(slice(n, n + k) for n, k in zip(corner, size, strict=True))
        out[:, *place] = np.tensordot(images[:, *window], kernel, len(size) + 1)
    return out
