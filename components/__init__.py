"""The four programs of the pipeline (shard, train, evaluate, register), their Kubeflow components and shared code."""
