"""Models: loading, the policy and the critic, packing, sharding, precision, saving, checkpoints of other trainers."""
