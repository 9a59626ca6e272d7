"""Step time beside what a user could run instead: `python -m benchmarks.peers`.

The same model, initial weights, global batches and optimizer, in each way of a comparison (`comparisons`), on two CPU
devices of this machine. All variants of a comparison are alive at once and take turns in short blocks of steps, in an
order that changes with every round; who is not running sleeps (`teams`). A ratio is taken within each round, so that
the machine's moods hit both sides. What a variant does is said in `variants`, and how PyTorch's own are set up in
`data_parallel`, `sharded` and `tensor_parallel`; `report` makes figures of it all, and says what they mean.
"""
