"""What is checked of dependencies, images, manifests and outputs, each a program: audit, sbom, manifests, canary."""
