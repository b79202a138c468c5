import torch

from sparse_gpt.train.checkpoint.random_state import rng_state, set_rng_state

CPU = torch.device("cpu")


def test_numbers_go_on_where_they_were():
    torch.manual_seed(3)
    torch.rand(5)
    saved = rng_state(CPU)
    expected = torch.rand(7), torch.nn.functional.dropout(torch.ones(9), 0.5)
    torch.manual_seed(4)
    set_rng_state(saved, CPU)
    assert torch.equal(torch.rand(7), expected[0])
    assert torch.equal(torch.nn.functional.dropout(torch.ones(9), 0.5), expected[1])


def test_what_is_saved_is_a_copy_that_a_checkpoint_can_hold(tmp_path):
    saved = rng_state(CPU)
    before = {name: state.clone() for name, state in saved.items()}
    torch.rand(5)
    assert all(torch.equal(saved[name], before[name]) for name in before)
    torch.save(saved, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    set_rng_state(loaded, CPU)
    assert torch.equal(torch.get_rng_state(), before["cpu"])
