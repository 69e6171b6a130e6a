"""Every speed claim of the project, as a program that measures it beside its peers and prints the ratios."""
