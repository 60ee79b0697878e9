"""What the kernel tests share: an implementation against its oracle, in values and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tolerances import assert_close

DTYPES = ("float32", "bfloat16", "float16")


def normal(seed, shape, dtype="float32", scale=1.0):
    """A deterministic normal array: numpy's generator, or where arrays are of a real model's size the GPU's own."""
    if np.prod(shape) > 1 << 20:
        return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, dtype)


def segments(batch, seq, *cuts):
    """Segment ids int `[batch, seq]`, 0 but for the last row, whose id grows by one at every cut."""
    ids = np.zeros((batch, seq), np.int32)
    for cut in cuts:
        ids[-1, cut:] += 1
    return jnp.asarray(ids)


def value_and_gradients(function, arguments, cotangent):
    """(outputs, gradients of every argument), compiled as one program."""

    def run(arguments, cotangent):
        outputs, pullback = jax.vjp(function, *arguments)
        return outputs, pullback(cotangent)

    # Interpreted kernels run once here and take long to compile: spare the compiler its passes.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(run, compiler_options=quick)(tuple(arguments), cotangent)


def assert_matches_oracle(op, oracle, arguments, cotangent, dtype, names):
    """Forward and every gradient of `op` are those of `oracle`; `names` label outputs, then arguments."""
    actual = jax.tree.leaves(value_and_gradients(op, arguments, cotangent))
    expected = jax.tree.leaves(value_and_gradients(oracle, arguments, cotangent))
    assert len(actual) == len(expected) == len(names)
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert_close(a, e, dtype=jnp.dtype(dtype), what=name)


def equations(function, *arguments):
    """Every equation of the whole program of `function`, those of inner programs and kernels included."""

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
                if hasattr(parameter, "eqns"):
                    yield from visit(parameter)

    return list(visit(jax.make_jaxpr(function)(*arguments)))


def shapes_computed(function, *arguments):
    """The shapes of every value that `function` computes."""
    return {getattr(v.aval, "shape", ()) for e in equations(function, *arguments) for v in e.outvars}


def kernel_outputs(function, *arguments):
    """Kernel name -> shapes of its outputs, for every Pallas kernel that `function` launches."""
    return {
        str(e.params["name"]): [v.aval.shape for v in e.outvars]
        for e in equations(function, *arguments)
        if e.primitive.name == "pallas_call"
    }


def gradient(function):
    """The pullback of ones through `function`, for inspection of the program: gradients of every argument."""

    def run(*arguments):
        output, pullback = jax.vjp(function, *arguments)
        return pullback(jax.tree.map(jnp.ones_like, output))

    return run


def saved_shapes(function, *arguments):
    """The sorted shapes of what `function` keeps from forward to backward."""
    _, pullback = jax.vjp(function, *arguments)
    return sorted(leaf.shape for leaf in jax.tree.leaves(pullback))
