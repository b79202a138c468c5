import pytest
from pydantic import ValidationError

from sparse_gpt import ModelConfig, UltraEfficientSparseFFN
from sparse_gpt.model.config import SpectralConfig

SIZES = ("tiny", "124m", "355m", "774m", "1558m")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ffn", ["dense", "paper", "light", "default"])
def test_presets_expand_and_round_trip(size, ffn):
    config = ModelConfig.preset(size, ffn=ffn)
    dump = config.model_dump(mode="json")
    assert "preset" not in str(dump)
    assert ModelConfig(**dump) == config
    assert ModelConfig.model_validate(config.model_dump()) == config


def test_mapping_with_presets_is_merged_deeply():
    spectral = {"keep": 0.25}
    config = ModelConfig(preset="tiny", n_layer=2, ffn={"preset": "light", "spectral": spectral})
    assert (config.n_layer, config.d_model) == (2, 128)
    light = UltraEfficientSparseFFN(preset="light").config
    assert config.ffn.spectral == light.spectral.model_copy(update={"keep": 0.25})
    assert config.ffn.polynomial == light.polynomial


def test_a_spectrum_of_another_kind_takes_the_place_of_the_presets():
    other = {"polynomial": None, "norm_out": None}
    ffn = {"preset": "paper", "spectral": {"kind": "dictionary", "blocks": 8}, **other}
    spectral = ModelConfig.preset("tiny", ffn=ffn).ffn.spectral
    assert (spectral.blocks, spectral.top_k, spectral.size(128)) == (8, 2, 64)


def test_parts_can_be_switched_off_and_on():
    ffn = {"preset": "paper", "spectral": None, "refine": None, "feedback": {"rank": 2}}
    config = ModelConfig.preset("tiny", ffn=ffn)
    assert config.ffn.spectral is None
    assert config.ffn.refine is None
    assert config.ffn.feedback.rank == 2


def test_dense_twin_differs_in_the_ffn_only():
    sparse = ModelConfig.preset("tiny", ffn={"preset": "paper", "dropout": 0.2})
    twin = sparse.dense_twin()
    assert (twin.ffn.kind, twin.ffn.dropout) == ("dense", 0.2)
    assert twin.model_dump(exclude={"ffn"}) == sparse.model_dump(exclude={"ffn"})


@pytest.mark.parametrize(
    ("d_model", "factors"), [(128, (8, 16)), (768, (24, 32)), (1600, (40, 40)), (7, (1, 7))]
)
def test_default_factors_are_the_most_square(d_model, factors):
    assert SpectralConfig().split(d_model) == factors


def paper(**parts):
    return {"preset": "tiny", "ffn": {"preset": "paper", **parts}}


@pytest.mark.parametrize(
    ("mapping", "key", "words"),
    [
        ({"preset": "tny"}, None, ["'tny'", "tiny", "1558m"]),
        ({"preset": ["tiny"]}, None, ["['tiny']", "tiny"]),
        ({"preset": "tiny", "ffn": "dens"}, "ffn", ["'dens'", "dense", "default"]),
        ({"preset": "tiny", "n_layers": 3}, "n_layers", ["not permitted"]),
        ({"preset": "tiny", "n_layer": "four"}, "n_layer", ["integer"]),
        ({"preset": "tiny", "n_layer": 0}, "n_layer", ["greater than 0"]),
        ({"preset": "tiny", "n_head": 3}, None, ["n_head 3", "128", "1, 2, 4"]),
        ({"preset": "tiny", "dropout": 1.0}, "dropout", ["less than 1"]),
        (paper(keep=0.5), "keep", ["not permitted"]),
        (paper(spectral={"kep": 0.5}), "kep", ["not permitted"]),
        (paper(spectral={"keep": 0}), "keep", ["greater than 0"]),
        (paper(spectral={"keep": 1.5}), "keep", ["less than or equal to 1"]),
        (paper(spectral={"path": "beside"}), "path", ["series", "parallel"]),
        (paper(spectral={"factors": [7, 18]}), None, ["(7, 18)", "126", "128"]),
        (paper(polynomial={"group_size": 24}), None, ["group_size 24", "128", "16, 32"]),
        (paper(polynomial={"degrees": [1, 3, 2]}), "degrees", ["(1, 3, 2)", "rise"]),
        (paper(polynomial={"degrees": [0, 1]}), 0, ["greater than 0"]),
        (paper(polynomial={"degrees": []}), "degrees", ["at least 1"]),
        (paper(feedback={"groups": 5}), None, ["groups 5", "128"]),
        (paper(feedback={"share": 1}), "share", ["less than 1"]),
        (paper(projection={"kind": "factored", "block": 48}), None, ["block 48", "128"]),
        (paper(refine={"stages": 0}), "stages", ["greater than 0"]),
        (paper(out_gain=0), "out_gain", ["greater than 0"]),
        (paper(backend="triton"), "backend", ["not permitted"]),
    ],
)
def test_a_bad_value_gives_one_error_that_names_it(mapping, key, words):
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**mapping)
    (error,) = caught.value.errors()
    assert (error["loc"][-1] if error["loc"] else None) == key
    assert "\n" not in error["msg"]
    for word in words:
        assert word in error["msg"]


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig.preset("tiny").d_model = 256


def test_what_version_0_1_wrote_is_read():
    for backend in ("auto", "eager"):
        assert ModelConfig(**paper(backend=backend)) == ModelConfig(**paper())
