"""Initial weights: bounds and variances of the formulas, with bounds on chance that are derived."""

import math

import numpy as np
import pytest

from disttrain import initializers
from disttrain.backend import random_generator
from disttrain.errors import ConfigError

# chance of a wrong alarm with six standard deviations: 2e-9
SIGMAS = 6


def draw(initializer, shape, seed=0):
    return initializers.get(initializer)(random_generator(seed, "test"), shape)


def check_moments(values, mean, variance, fourth):
    """Check mean and variance of n independent values whose fourth central moment is `fourth`."""
    n = values.size
    assert values.mean() == pytest.approx(mean, abs=SIGMAS * math.sqrt(variance / n))
    squares = ((values - mean) ** 2).mean()
    assert squares == pytest.approx(variance, abs=SIGMAS * math.sqrt((fourth - variance**2) / n))


SCALED = {
    "glorot_uniform": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "glorot_normal": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "he_uniform": lambda fan_in, fan_out: 2 / fan_in,
    "he_normal": lambda fan_in, fan_out: 2 / fan_in,
    "lecun_uniform": lambda fan_in, fan_out: 1 / fan_in,
    "lecun_normal": lambda fan_in, fan_out: 1 / fan_in,
}
# a window counts for both fans: Keras 3, `compute_fans`
FANS = {(300, 100): (300, 100), (3, 5, 40, 50): (600, 750), (7, 200, 30): (1400, 210), (30_000,): (30_000, 30_000)}


@pytest.mark.parametrize("shape", FANS, ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_variances_are_scaled_by_the_fans(name, shape):
    variance = SCALED[name](*FANS[shape])
    values = draw(name, shape)
    assert values.shape == shape
    if name.endswith("uniform"):
        limit = math.sqrt(3 * variance)
        fourth = 9 / 5 * variance**2
        # of n values the largest is below limit * (1 - d) with probability (1 - d)**n < exp(-n d) = 1e-9
        assert limit * (1 - 21 / values.size) < np.abs(values).max() <= limit
    else:
        stddev = math.sqrt(variance) / truncated_stddev()
        fourth = truncated_fourth() * stddev**4
        assert np.abs(values).max() <= 2 * stddev
        # beyond 1.9 of 2 standard deviations are 1.2 percent of the values: of 28,000 none never
        assert np.abs(values).max() > 1.9 * stddev
    check_moments(values, 0, variance, fourth)


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def truncated_stddev():
    """Return the standard deviation of a standard normal cut at 2: ``1 - 2 a f(a) / (2 F(a) - 1)``, a = 2."""
    return math.sqrt(1 - 4 * density(2) / math.erf(math.sqrt(2)))


def truncated_fourth():
    """Return its fourth moment, by parts: ``3 m2 - 2 a**3 f(a) / (2 F(a) - 1)``."""
    return 3 * truncated_stddev() ** 2 - 16 * density(2) / math.erf(math.sqrt(2))


def test_normal_and_uniform_draw_as_they_say():
    check_moments(draw("random_normal", (200, 100)), 0, 0.05**2, 3 * 0.05**4)
    check_moments(draw(initializers.random_normal(3, 2), (200, 100)), 3, 4, 3 * 16)
    check_moments(draw("random_uniform", (200, 100)), 0, 0.1**2 / 12, 0.1**4 / 80)
    values = draw(initializers.random_uniform(2, 5), (200, 100))
    check_moments(values, 3.5, 9 / 12, 81 / 80)
    assert 2 <= values.min() < values.max() < 5


def test_the_truncated_normal_draws_again_beyond_two_deviations():
    values = draw(initializers.truncated_normal(1, 3), (200, 100))
    assert np.abs(values - 1).max() <= 6
    assert len(np.unique(values)) == values.size  # drawn again, not clipped
    check_moments(values, 1, 9 * truncated_stddev() ** 2, 81 * truncated_fourth())


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 3, 4), (3, 1)], ids=str)
def test_orthogonal_matrices_have_orthonormal_columns_or_rows(shape):
    values = draw(initializers.orthogonal(2), shape)
    assert values.shape == shape
    matrix = values.reshape(-1, shape[-1]) / 2
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    # Householder's reflections: a few roundings for each of at most 7 columns
    np.testing.assert_allclose(gram, np.eye(len(gram)), rtol=0, atol=100 * 2**-53)


def test_every_orthogonal_matrix_is_as_likely_as_another():
    """So each element of the first row has either sign; without a fixed sign of R's diagonal some never have."""
    corners = np.array([draw("orthogonal", (2, 2), seed)[0] for seed in range(200)])
    # of 200 signs, six standard deviations from the half
    assert (abs((corners > 0).mean(0) - 0.5) < SIGMAS * 0.5 / math.sqrt(200)).all()


def test_orthogonal_vectors_are_an_error():
    with pytest.raises(ConfigError, match=r"two axes or more is needed, not of shape \(3,\)"):
        draw("orthogonal", (3,))


def test_constants():
    for name, value in (("zeros", 0), ("ones", 1), (initializers.constant(2.5), 2.5)):
        np.testing.assert_array_equal(draw(name, (2, 3)), np.full((2, 3), value))


@pytest.mark.parametrize("name", [*SCALED, "random_normal", "random_uniform", "truncated_normal", "orthogonal"])
def test_values_follow_from_the_generator_alone(name):
    np.testing.assert_array_equal(draw(name, (4, 5)), draw(name, (4, 5)))
    assert not np.array_equal(draw(name, (4, 5)), draw(name, (4, 5), seed=1))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 2, 0, 3)], ids=str)
def test_weights_without_elements_or_axes_can_be_made(shape):
    assert draw("glorot_uniform", shape).shape == shape
    assert draw("he_normal", shape).shape == shape


def test_a_function_is_an_initializer():
    assert draw(lambda generator, shape: np.full(shape, 7), (1,)) == 7


def test_wrong_names_are_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown initializer 'glorot_unifrom'; did you mean 'glorot_uniform'"):
        initializers.get("glorot_unifrom")
    with pytest.raises(ConfigError, match="name or a function, not 3"):
        initializers.get(3)
    with pytest.raises(ConfigError, match="unknown mode 'fan'; did you mean"):
        initializers.variance_scaling(1, "fan", "uniform")
    with pytest.raises(ConfigError, match=r"unknown distribution 'normal'.*truncated_normal"):
        initializers.variance_scaling(1, "fan_in", "normal")
