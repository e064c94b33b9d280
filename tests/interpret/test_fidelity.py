"""What approximations keep of the gain."""

import pytest

from moeadapt.errors import ConfigError
from moeadapt.interpret import fidelity
from tests.interpret.kit import answers_of, items, mean_loss, model_of, zeroed


@pytest.fixture(scope="module")
def model():
    return model_of("block")


@pytest.fixture(scope="module")
def data(model):
    """Texts whose next token is the mixture's own answer, so that the base is worse."""
    return [answers_of(model, item) for item in items(1)]


def test_kept_is_a_share_of_the_gain_over_the_base(model, data):
    found = fidelity(model, data)
    with model.disable_adapter():
        base = mean_loss(model, data)
    mixture = mean_loss(model, data)
    assert base > mixture
    assert found.base == pytest.approx(base)
    assert found.mixture == pytest.approx(mixture)
    overrides = {"top_1": {"k": 1}, "uniform": {"router": "uniform"}}
    overrides |= {f"expert_{e}": {"force": e} for e in range(4)}
    assert list(found.approximations) == list(overrides)
    for name, override in overrides.items():
        loss = mean_loss(model, data, **override)
        assert found.approximations[name].loss == pytest.approx(loss)
        assert found.approximations[name].kept == pytest.approx((base - loss) / (base - mixture))


def test_the_mixture_keeps_all_and_no_expert_nothing(model, data):
    own = {"edit": lambda _, routing: routing.expert_weights}
    found = fidelity(model, data, {"same": own, "none": {"edit": zeroed(range(4))}})
    assert found.approximations["same"].kept == pytest.approx(1)
    assert found.approximations["none"].kept == pytest.approx(0, abs=1e-12)


def test_without_a_gain_nothing_can_be_kept(model):
    with model.disable_adapter():
        data = [answers_of(model, item) for item in items(1)]
    found = fidelity(model, data, {"one": {"k": 1}})
    assert found.base < found.mixture
    assert found.approximations["one"].kept is None


def test_an_impossible_approximation_is_refused_before_anything_runs(model):
    with pytest.raises(ConfigError, match="force=9"):
        fidelity(model, [], {"good": {"k": 1}, "bad": {"force": 9}})
    with pytest.raises(ConfigError, match="approximations is empty"):
        fidelity(model, [], {})
