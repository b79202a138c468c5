"""One rank of a run: the file that `deepspeed`, `torchrun` or `srun` starts, one process a rank.

    deepspeed --num_gpus 2 launch/train.py --config configs/tiny-sparse.yaml optimizer.lr=1e-3

The same as the module `sparse_gpt.train`, which `sparse-gpt train` starts. The loop is
sparse_gpt/train/loop.py.
"""

from sparse_gpt.train.rank import main

if __name__ == "__main__":
    main()
