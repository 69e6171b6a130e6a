"""The pipeline of the four stages on Kubeflow Pipelines: definition, submission, images."""
