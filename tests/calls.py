"""Arguments of every routing algorithm."""

import jax
import jax.numpy as jnp
import numpy as np

from capsjax import HeinsenParameters

CHILDREN, PARENTS, FEATURES = 6, 4, 5


def arguments(name, *leading):
    """Arrays with the leading axes, first votes or poses, and keyword arguments."""
    rng = np.random.default_rng(0)
    votes, poses = (
        rng.normal(size=(*leading, CHILDREN, *shape)).astype("f4")
        for shape in ((PARENTS, FEATURES), (FEATURES,))
    )
    present = np.full((*leading, CHILDREN), 0.5, np.float32)
    betas = {"beta_a": jnp.ones(PARENTS), "beta_u": jnp.ones(PARENTS)}
    shapes = HeinsenParameters.shapes(CHILDREN, FEATURES, PARENTS, FEATURES)
    heinsen = HeinsenParameters(*(rng.normal(size=s).astype("f4") for s in shapes.values()))
    return {
        "em": ((votes, present), betas),
        "heinsen": ((poses,), {"parameters": heinsen}),
        "random": ((votes,), {"key": jax.random.key(0)}),
        "self": ((votes, present, votes[..., 0]), {}),
        "variational": ((votes, present), betas),
    }.get(name, ((votes,), {}))
