"""What every optimizer does with variables, gradients and learning rates, and what it refuses."""

import numpy as np
import pytest

from disttrain import Tensor, optimizers
from disttrain.errors import ConfigError, ShapeError
from disttrain.optimizers import SGD, Adam, AdamW, Optimizer


def test_variables_are_tensors_or_arrays_of_any_shape_changed_in_place():
    scalar, matrix, tensor = np.array(1.0), np.ones((2, 3)), Tensor(np.ones((2, 1, 2)), requires_grad=True)
    array = tensor.data
    (tensor * tensor).sum().backward()
    SGD(0.25).apply([np.array(1.0), Tensor(np.ones((2, 3))), tensor.grad], [scalar, matrix, tensor])
    assert scalar == 0.75
    np.testing.assert_array_equal(matrix, np.full((2, 3), 0.75))
    assert tensor.data is array
    np.testing.assert_array_equal(array, np.full((2, 1, 2), 0.5))


def test_gradients_may_lie_in_memory_as_they_like():
    w, g = np.zeros((2, 3)), np.arange(6.0).reshape(3, 2)
    SGD(1.0).apply([g.T], [w])
    np.testing.assert_array_equal(w, -g.T)
    SGD(1.0).apply([np.broadcast_to(1.0, (2, 3))], [w])
    np.testing.assert_array_equal(w, -g.T - 1)


def test_empty_variables_and_none_are_fine():
    SGD().apply([np.zeros((0, 3))], [np.zeros((0, 3))])
    SGD().apply([], [])


def test_each_variable_has_slots_of_its_own():
    a, b = np.zeros(2), np.zeros((2, 2))
    optimizer = Adam()
    optimizer.apply([np.ones(2), np.zeros((2, 2))], [a, b])
    assert [slots.keys() for slots in optimizer.slots] == [{"momentum", "velocity"}] * 2
    np.testing.assert_allclose(optimizer.slots[0]["momentum"], 0.1)
    assert not optimizer.slots[1]["momentum"].any()
    assert SGD().slot_names == ()


def test_a_schedule_is_asked_once_a_step_counted_from_zero():
    asked = []

    def schedule(step):
        asked.append(step)
        return 1 / (step + 1)

    optimizer = SGD(schedule)
    a, b = np.zeros(1), np.zeros(1)
    for _ in range(3):
        optimizer.apply([np.ones(1), np.ones(1)], [a, b])
    assert asked == [0, 1, 2]
    assert optimizer.iterations == 3
    np.testing.assert_allclose([a, b], [[-11 / 6], [-11 / 6]], rtol=1e-15)


@pytest.mark.parametrize("make", [SGD, lambda rate: SGD(rate, 0.9), Adam, AdamW])
@pytest.mark.parametrize("rate", [np.float64(0.1), lambda step: np.float64(0.1), lambda step: np.array(0.1)])
def test_learning_rates_of_numpy_compute_as_pythons_do(make, rate):
    g = np.random.default_rng(0).standard_normal(1000).astype("float32")
    results = []
    for given in (0.1, rate):
        w, optimizer = np.ones(1000, np.float32), make(given)
        for _ in range(3):
            optimizer.apply([g], [w])
        results.append(w)
    np.testing.assert_array_equal(*results)


def test_gradients_of_another_shape_are_an_error_that_shows_both():
    with pytest.raises(ShapeError, match=r"\[\(3,\)\] for variables of shapes \[\(2,\)\]"):
        SGD().apply([np.ones(3)], [np.ones(2)])
    with pytest.raises(ShapeError):
        SGD().apply([np.ones(2)], [np.ones(2), np.ones(2)])


def test_another_models_variables_are_an_error():
    optimizer = Adam()
    optimizer.apply([np.ones(2)], [np.ones(2)])
    with pytest.raises(ConfigError, match="belongs to one model"):
        optimizer.apply([np.ones(3)], [np.ones(3)])


@pytest.mark.parametrize(
    "variable", [np.ones((2, 3)).T, np.ones(6)[::2], np.float32(1), np.asfortranarray(np.ones((2, 2)))]
)
def test_variables_that_would_be_copied_instead_of_changed_are_an_error(variable):
    before = np.array(variable)
    with pytest.raises(ShapeError, match="cannot be changed in place"):
        SGD().apply([np.ones(np.shape(variable))], [variable])
    np.testing.assert_array_equal(variable, before)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: SGD(-0.1), r"SGD: learning_rate must be at least 0, not -0\.1"),
        (lambda: Adam(float("nan")), "Adam: learning_rate"),
        (lambda: SGD(momentum=1.0), "momentum must be from 0 to below 1"),
        (lambda: Adam(beta_1=1.0), "Adam: beta_1"),
        (lambda: AdamW(beta_2=-0.1), "AdamW: beta_2"),
    ],
)
def test_a_wrong_argument_is_an_error_of_the_constructor(make, expected):
    with pytest.raises(ConfigError, match=expected):
        make()


@pytest.mark.parametrize(
    ("name", "cls"), [("sgd", SGD), ("adam", Adam), ("adamw", AdamW), ("Adam", Adam), ("SGD", SGD)]
)
def test_names_give_new_optimizers_with_defaults(name, cls):
    one, other = optimizers.get(name), optimizers.get(name)
    assert type(one) is cls
    assert one is not other
    assert one.get_config() == cls().get_config()


def test_an_optimizer_is_itself():
    optimizer = SGD()
    assert optimizers.get(optimizer) is optimizer


def test_unknown_names_are_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown optimizer 'adm'; did you mean 'adam'"):
        optimizers.get("adm")
    with pytest.raises(ConfigError, match="name or an Optimizer, not 3"):
        optimizers.get(3)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(0.1, 0.5, nesterov=True, gradient_accumulation_steps=2),
        Adam(0.1, 0.2, 0.3, 0.4, gradient_accumulation_steps=3),
        AdamW(0.1, 0.5, 0.2, 0.3, 0.4, gradient_accumulation_steps=4),
    ],
)
def test_a_configuration_makes_the_optimizer_again(optimizer):
    config = optimizer.get_config()
    default = type(optimizer)().get_config()
    assert type(optimizer)(**config).get_config() == config
    assert all(config[name] != default[name] for name in default)


def test_an_optimizer_of_the_users_own_is_one_method():
    class Signs(Optimizer):
        slot_names = ("steps",)

        def update(self, parameter, gradient, slots, *, learning_rate, step):
            slots["steps"] += 1
            parameter -= learning_rate * np.sign(gradient)

    w, optimizer = np.zeros((2, 2)), Signs(0.5)
    optimizer.apply([np.array([[2.0, -3], [0, 1]])], [w])
    np.testing.assert_array_equal(w, [[-0.5, 0.5], [0, -0.5]])
    np.testing.assert_array_equal(optimizer.slots[0]["steps"], np.ones((2, 2)))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_accumulated_gradients_make_one_update_by_their_mean(kind):
    grads = np.random.default_rng(5).standard_normal((6, 3))
    rates = []

    def schedule(step):
        rates.append(step)
        return 0.1

    ours, theirs = np.ones(3), np.ones(3)
    optimizer, plain = kind(schedule, gradient_accumulation_steps=3), kind(0.1)
    for number, g in enumerate(grads):
        before = ours.copy()
        assert optimizer.is_due == (number % 3 == 2)
        optimizer.apply([g], [ours])
        assert np.array_equal(ours, before) == (number % 3 != 2)
        assert (optimizer.steps, optimizer.iterations) == (number + 1, (number + 1) // 3)
    for three in (grads[:3], grads[3:]):
        plain.apply([np.mean(three, axis=0)], [theirs])
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)  # sums of three float64 in another order
    assert rates == [2, 5]  # as in Keras: a schedule is asked by steps


@pytest.mark.parametrize("number", [0, 1, -2, 2.5, "2"])
def test_an_accumulation_is_of_at_least_two_steps(number):
    with pytest.raises(ConfigError, match="gradient_accumulation_steps must be an integer of at least 2"):
        SGD(gradient_accumulation_steps=number)
