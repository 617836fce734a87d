"""The order of training: every image once an epoch, by seed and epoch only, for any number of processes."""

import pytest

from vlm.data import epoch_plan


@pytest.mark.parametrize("n", [1, 5, 8, 23, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 8), (4, 2), (3, 5)])
def test_each_sample_counts_once_an_epoch_over_all_processes(n, world, batch_size, accumulation):
    plans = [epoch_plan(n, batch_size, accumulation, seed=3, epoch=1, world=world, rank=rank) for rank in range(world)]
    counted = [i for plan in plans for step in plan if step.counts for batch in step.batches for i in batch]
    assert sorted(counted) == list(range(n))
    assert len({len(plan) for plan in plans}) == 1, "every process must have every step"
    for step in (step for plan in plans for step in plan):
        assert 1 <= len(step.batches) <= accumulation
        assert all(1 <= len(batch) <= batch_size for batch in step.batches)
    full = n // (batch_size * accumulation * world)
    assert all(
        step.counts and sum(map(len, step.batches)) == batch_size * accumulation
        for plan in plans
        for step in plan[:full]
    )


def test_a_step_holds_the_same_samples_for_any_number_of_processes():
    single = epoch_plan(50, 4, 4, seed=1, epoch=2)
    four = [epoch_plan(50, 2, 2, seed=1, epoch=2, world=4, rank=rank) for rank in range(4)]
    for number, step in enumerate(single):
        together = [i for plan in four if plan[number].counts for batch in plan[number].batches for i in batch]
        assert sorted(together) == sorted(i for batch in step.batches for i in batch)


def test_the_order_is_a_function_of_seed_and_epoch():
    plan = epoch_plan(40, 2, 2, seed=1, epoch=0)
    assert list(epoch_plan(40, 2, 2, seed=1, epoch=0)) == list(plan)
    assert list(epoch_plan(40, 2, 2, seed=1, epoch=1)) != list(plan) != list(epoch_plan(40, 2, 2, seed=2, epoch=0))
    assert list(plan[3:]) == list(plan)[3:], "a resumed run takes the rest"
