"""The folder of a built-in model is called by its name again."""

from moeadapt.embedded import cache_folder, name_of


def test_the_folder_of_a_built_in_model_has_its_name(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEADAPT_CACHE", str(tmp_path))
    assert name_of(str(cache_folder() / "smollm2-135m-v1")) == "embedded:smollm2-135m"
    assert name_of(str(tmp_path / "other")) == str(tmp_path / "other")
    assert name_of("org/model") == "org/model"
