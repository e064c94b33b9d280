"""Names, misspellings and foreign configs: what a user can get wrong, and what the error says."""

import json

import pytest

from moeadapt.balance import BALANCE, parse_balance
from moeadapt.balance.switch import SwitchConfig
from moeadapt.errors import ConfigError, MoeAdaptError
from moeadapt.experts import EXPERTS, FACTOR_NAMES
from moeadapt.registry import ComponentConfig, Registry
from moeadapt.routers import ROUTERS
from moeadapt.routers.top_k import TopKConfig

REGISTRIES = {"router": ROUTERS, "balance loss": BALANCE, "expert": EXPERTS}
registries = pytest.mark.parametrize("kind", sorted(REGISTRIES))


@registries
def test_a_registry_is_a_mapping_from_names_to_config_classes(kind):
    registry = REGISTRIES[kind]
    assert len(registry) == len(list(registry)) > 0
    for name, cls in registry.items():
        assert name in registry
        assert registry[name] is cls
        assert issubclass(cls, ComponentConfig)
        assert registry.name_of(registry.parse(name)) == name


@registries
@pytest.mark.parametrize("name", ["nothing like it", "", None, 3, ["top_k"], {"a": 1}], ids=repr)
def test_an_unknown_name_lists_the_choices(kind, name):
    registry = REGISTRIES[kind]
    for spec in ({"name": name}, name if isinstance(name, str) else {}):
        said = f"unknown {kind} .*; one of " if spec != {} else f"{kind} .* has no 'name'; one of "
        with pytest.raises(ConfigError, match=said) as caught:
            registry.parse(spec)
        assert all(repr(known) in str(caught.value) for known in registry)
    assert name not in registry


def test_a_misspelt_name_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown router 'topk'.*did you mean 'top_k'\?"):
        ROUTERS.parse("topk")


def test_a_misspelt_field_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'temprature'.*did you mean 'temperature'\?"):
        ROUTERS.parse({"name": "top_k", "temprature": 2.0})


def test_every_wrong_field_is_reported_at_once():
    with pytest.raises(ConfigError, match=r"router 'top_k': .*k=0.*jitter=2\.0.*'x'"):
        ROUTERS.parse({"name": "top_k", "k": 0, "jitter": 2.0, "x": 1})


@pytest.mark.parametrize("spec", [3, None, ["top_k"], ("name", "top_k")], ids=repr)
def test_a_spec_that_is_no_name_and_no_mapping_is_refused(spec):
    with pytest.raises(ConfigError, match="must be a name or a mapping"):
        ROUTERS.parse(spec)


def test_a_field_name_that_is_no_string_is_refused():
    with pytest.raises(ConfigError, match="router 'top_k'"):
        ROUTERS.parse({"name": "top_k", 1: 2})


def test_a_finished_config_is_taken_as_it_is():
    config = TopKConfig(k=3)
    assert ROUTERS.parse(config) is config


def test_a_config_of_another_registry_is_refused():
    with pytest.raises(ConfigError, match="a SwitchConfig is not a router"):
        ROUTERS.parse(SwitchConfig())


def test_a_subclass_that_is_not_registered_has_no_name():
    class Unregistered(TopKConfig):
        """Not in the registry, so a saved adapter could not name it."""

    with pytest.raises(ConfigError, match="a Unregistered is not a router"):
        ROUTERS.spec(Unregistered())


def test_a_config_cannot_be_changed():
    config = ROUTERS.parse("top_k")
    with pytest.raises(ValueError, match="frozen"):
        config.k = 1


def test_errors_of_users_are_value_errors_of_one_family():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, MoeAdaptError)


def test_parsing_leaves_the_spec_alone():
    spec = {"name": "top_k", "k": 1}
    ROUTERS.parse(spec)
    assert spec == {"name": "top_k", "k": 1}


def test_a_registry_does_not_follow_the_dict_it_was_made_from():
    entries = {"top_k": TopKConfig}
    registry = Registry("router", entries)
    entries.clear()
    assert list(registry) == ["top_k"]


def test_every_factor_of_every_expert_type_is_known():
    needed = {name for cls in EXPERTS.values() for name in cls.bank.factor_names}
    assert set(FACTOR_NAMES) == needed
    assert list(FACTOR_NAMES) == sorted(FACTOR_NAMES)


# --- the balance mapping


def test_a_coefficient_and_a_mapping_say_the_same():
    assert parse_balance({"switch": 0.5}) == parse_balance({"switch": {"coef": 0.5}})


@pytest.mark.parametrize("nothing", [None, {}], ids=repr)
def test_no_balance_is_no_loss(nothing):
    assert parse_balance(nothing) == {}


def test_balance_losses_keep_their_order():
    for names in (["switch", "z_loss"], ["z_loss", "switch"]):
        assert list(parse_balance(dict.fromkeys(names, 0.1))) == names


def test_balance_survives_json():
    losses = parse_balance({"switch": 0.1, "z_loss": {"coef": 1e-3}})
    saved = json.dumps({name: loss.model_dump(mode="json") for name, loss in losses.items()})
    assert parse_balance(json.loads(saved)) == losses


@pytest.mark.parametrize("spec", [0.1, "switch", ["switch"], ("switch", 0.1)], ids=repr)
def test_balance_that_is_no_mapping_is_refused_with_an_example(spec):
    with pytest.raises(ConfigError, match=r"like \{'switch': 0.01\}"):
        parse_balance(spec)


@pytest.mark.parametrize("coef", [-0.1, float("nan"), float("inf"), "0.1", True, None, [1]])
def test_a_coefficient_that_is_no_number_of_zero_or_more_is_refused(coef):
    with pytest.raises(ConfigError, match="balance loss 'switch': coef="):
        parse_balance({"switch": coef})


def test_a_name_inside_that_contradicts_its_key_is_refused():
    with pytest.raises(ConfigError, match=r"balance 'switch': name='z_loss' contradicts"):
        parse_balance({"switch": {"name": "z_loss", "coef": 0.1}})
    assert parse_balance({"switch": {"name": "switch", "coef": 0.1}})["switch"].coef == 0.1
