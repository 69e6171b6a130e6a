"""Programs for pods of pipelines.prove.  A pod gets their text (python -c), so the images need not contain them; they
use only what the images have: the standard library, runtime, components.
The last thing that one prints is a line of JSON."""
