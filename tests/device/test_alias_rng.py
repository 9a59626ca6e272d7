"""Seeds for random operators, and `torch.Generator("cuda")`."""

import copy
import pickle

import pytest
import torch

from moai.device import alias, rng


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    assert alias.turn_on()


def draw(generator=None, n=4):
    return [rng.next_seed(generator) for _ in range(n)]


def test_seeds_are_63_bit_numbers_that_differ():
    rng.manual_seed(0)
    seeds = draw(n=1000)
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert max(seeds) > 1 << 62


def test_neighbouring_seeds_give_unrelated_streams():
    first, second = rng.Stream(1), rng.Stream(2)
    assert not {first.next_seed() for _ in range(100)} & {second.next_seed() for _ in range(100)}


def test_negative_seeds_wrap():
    assert rng.Stream(-1).seed == (1 << 64) - 1
    with pytest.raises(RuntimeError, match="64 bits"):
        rng.Stream(1 << 64)


def test_a_state_of_another_device_is_refused():
    with pytest.raises(RuntimeError, match="another kind of device"):
        rng.set_state(torch.get_rng_state())
    with pytest.raises(TypeError, match="ByteTensor"):
        rng.set_state(torch.zeros(16))


def test_a_generator_says_that_it_is_on_cuda():
    generator = torch.Generator("cuda")
    assert generator.device == torch.device("cuda:0")
    assert isinstance(generator, torch.Generator)
    assert torch.Generator(device=torch.device("cuda")).device.type == "cuda"


def test_generators_of_the_cpu_are_untouched():
    assert type(torch.Generator()) is torch.Generator
    assert torch.Generator().device.type == "cpu"
    assert isinstance(torch.default_generator, torch.Generator)
    torch.manual_seed(0)
    expected = torch.rand(3)
    assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(0)), expected)


def test_a_generator_gives_the_same_seeds_for_the_same_seed():
    one, two = (torch.Generator("cuda").manual_seed(7) for _ in range(2))
    assert draw(one) == draw(two)
    assert one.initial_seed() == 7
    assert draw(one.manual_seed(7)) != draw(one)


def test_a_generator_leaves_the_default_stream_alone():
    rng.manual_seed(0)
    before = rng.get_state()
    draw(torch.Generator("cuda"))
    assert torch.equal(rng.get_state(), before)


def test_the_state_of_a_generator_is_saved_and_restored():
    generator = torch.Generator("cuda").manual_seed(7)
    draw(generator)
    state, expected = generator.get_state(), draw(generator.clone_state())
    assert draw(generator) == expected
    assert draw(generator.set_state(state)) == expected


def test_generators_are_copied_and_pickled():
    generator = torch.Generator("cuda").manual_seed(7)
    draw(generator)
    copies = copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))
    expected = draw(generator)
    assert [draw(each) for each in copies] == [expected] * 2


def test_the_default_generator_is_the_default_stream():
    (generator,) = torch.cuda.default_generators
    generator.manual_seed(9)
    assert rng.initial_seed() == torch.cuda.initial_seed() == 9


def test_a_generator_of_the_cpu_is_refused_as_on_a_gpu():
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        rng.next_seed(torch.Generator())
