"""The four programs of the pipeline and their Kubeflow definitions: shard, train, evaluate, register."""
